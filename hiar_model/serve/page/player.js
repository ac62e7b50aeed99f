// What shows the frames: both players take chunks, keep them, and are asked which frame is on the screen.
// A frame n is shown from n / fps seconds on. Chunks may come again after truncate().

const MOST_BYTES = 48 << 20; // held for the way back

class Held {
  // The chunks that a player holds, in order: {frame, frames, bytes}.
  constructor() { this.chunks = []; this.bytes = 0; }
  get first() { return this.chunks.length ? this.chunks[0].frame : 0; }
  get end() { const last = this.chunks.at(-1); return last ? last.frame + last.frames : 0; }
  add(frame, frames, bytes) { this.chunks.push({ frame, frames, bytes }); this.bytes += bytes; }
  cut(frame) { // forgets all from this frame on
    while (this.chunks.length && this.chunks.at(-1).frame >= frame) this.bytes -= this.chunks.pop().bytes;
  }
  shrink(position) { // forgets the oldest that were shown; returns whether any
    let any = false;
    while (this.bytes > MOST_BYTES && this.chunks.length > 1 &&
           this.chunks[1].frame < position) {
      this.bytes -= this.chunks.shift().bytes;
      any = true;
    }
    return any;
  }
}

export class VideoPlayer {
  // Fragments of an mp4 through MediaSource.
  constructor(video, fps) {
    this.video = video;
    this.fps = fps;
    this.held = new Held();
    this.playing = true;
    this.tasks = []; // of the source buffer, one after the other
    this.started = false;
    this.source = new MediaSource();
    this.url = URL.createObjectURL(this.source);
    video.src = this.url;
  }

  open(mime, init) { // again after a reconnect
    if (this.buffer) return this.run(() => this.buffer.appendBuffer(init));
    const ready = () => {
      if (this.buffer) return;
      this.buffer = this.source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.next());
      this.next();
    };
    if (this.source.readyState === "open") ready();
    else this.source.addEventListener("sourceopen", ready, { once: true });
    this.run(() => this.buffer.appendBuffer(init));
  }

  run(task) { this.tasks.push(task); this.next(); }

  next() {
    while (this.buffer && !this.buffer.updating && this.tasks.length && this.source.readyState !== "closed") {
      const task = this.tasks.shift();
      try {
        task();
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        this.tasks.unshift(task); // after the older half has made room
        const from = this.held.first / this.fps;
        this.buffer.remove(0, Math.max(from + 0.001, (from + this.video.currentTime) / 2));
      }
    }
  }

  add(frame, frames, bytes) {
    this.held.add(frame, frames, bytes.byteLength);
    this.run(() => this.buffer.appendBuffer(bytes));
    if (!this.started) this.run(() => this.seek(frame)); // not before: a video without metadata may forget it
    this.started = true;
    if (this.held.shrink(this.position)) {
      const first = this.held.first;
      this.run(() => this.buffer.remove(0, (first - 0.5) / this.fps));
    }
    if (this.playing && this.video.paused) this.play();
  }

  truncate(frame) {
    this.held.cut(frame);
    this.run(() => this.buffer.remove(Math.max(0, (frame - 0.5) / this.fps), Infinity));
    if (this.position >= frame) this.seek(frame);
  }

  finish() { this.run(() => { if (this.source.readyState === "open") this.source.endOfStream(); }); }

  get position() { return Math.floor(this.video.currentTime * this.fps + 0.02); }
  seek(frame) { this.video.currentTime = (frame + 0.05) / this.fps; }
  play() { this.playing = true; this.video.play().catch(() => {}); } // a pause that comes first is no error
  pause() { this.playing = false; this.video.pause(); }
  close() { this.video.pause(); this.video.removeAttribute("src"); this.video.load(); URL.revokeObjectURL(this.url); }
}

export class PicturePlayer {
  // WebP or JPEG pictures on a canvas.
  constructor(canvas, fps) {
    this.canvas = canvas;
    this.fps = fps;
    this.held = new Held();
    this.playing = true;
    this.pictures = new Map(); // frame -> file, as it came
    this.decoded = new Map(); // frame -> promise of the image, a few around the position
    this.at = 0; // frames, with what has passed of the present one
    this.shown = -1;
    this.last = performance.now();
    this.alive = true;
    requestAnimationFrame((now) => this.tick(now));
  }

  open() {}
  finish() {}

  add(frame, frames, bytes) {
    if (!this.held.chunks.length) this.at = frame;
    this.held.add(frame, frames, bytes.byteLength);
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    for (let i = 0, at = 0; i < frames; i++) {
      const size = view.getUint32(at);
      this.pictures.set(frame + i, new Blob([bytes.subarray(at + 4, at + 4 + size)]));
      at += 4 + size;
    }
    if (this.held.shrink(this.position)) this.forget((n) => n < this.held.first);
  }

  truncate(frame) {
    this.held.cut(frame);
    this.forget((n) => n >= frame);
    if (this.position >= frame) this.seek(frame);
  }

  forget(which) {
    for (const map of [this.pictures, this.decoded]) for (const n of map.keys()) if (which(n)) map.delete(n);
    if (which(this.shown)) this.shown = -1;
  }

  tick(now) {
    if (!this.alive) return;
    const passed = Math.min((now - this.last) / 1000, 0.5) * this.fps;
    this.last = now;
    if (this.playing && this.held.end > this.position) this.at = Math.min(this.at + passed, this.held.end - 0.001);
    this.draw();
    requestAnimationFrame((later) => this.tick(later));
  }

  image(n) {
    if (!this.decoded.has(n)) this.decoded.set(n, createImageBitmap(this.pictures.get(n)));
    return this.decoded.get(n);
  }

  draw() {
    const n = this.position;
    if (n === this.shown || !this.pictures.has(n)) return;
    this.shown = n;
    for (let k = n; k < n + 8 && this.pictures.has(k); k++) this.image(k);
    for (const [k, image] of this.decoded) {
      if (k >= n && k < n + 8) continue;
      this.decoded.delete(k);
      image.then((bitmap) => bitmap.close(), () => {});
    }
    this.image(n).then((bitmap) => {
      if (this.shown !== n) return;
      if (this.canvas.width !== bitmap.width) [this.canvas.width, this.canvas.height] = [bitmap.width, bitmap.height];
      this.canvas.getContext("2d").drawImage(bitmap, 0, 0);
      this.canvas.dataset.frame = n;
    }, () => {});
  }

  get position() { return Math.floor(this.at); }
  seek(frame) { this.at = frame; this.draw(); }
  play() { this.playing = true; }
  pause() { this.playing = false; }
  close() { this.alive = false; this.forget(() => true); }
}
