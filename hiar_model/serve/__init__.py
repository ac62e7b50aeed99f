"""`hiar serve`: endless video that answers, over a WebSocket; whole videos as jobs; a page. Needs the extra [serve]."""
