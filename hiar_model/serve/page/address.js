// Where the server is, and why it may not answer.

export const address = new URLSearchParams(`${location.search.slice(1)}&${location.hash.slice(1)}`);
const secret = address.get("token");

export function withToken(path) { // an address of this server, which a proxy may have beneath a path of its own
  const url = new URL(path.replace(/^\//, ""), document.baseURI);
  if (secret !== null) url.searchParams.set("token", secret);
  return url;
}

export async function whyNot() { // a WebSocket that was refused does not say why
  try {
    const answer = await fetch(withToken("/v1/videos"));
    if (answer.status === 401) return "No connection: the server wants a token, as in the address that it printed.";
    return answer.ok ? "No connection: all places of the server are taken. Try again later." : "No connection.";
  } catch {
    return "No connection: the server cannot be reached.";
  }
}
