// The videos that were saved: a list on the page, and for a page that is loaded anew in the browser.

const KEY = "hiar-saves";
const stored = () => JSON.parse(sessionStorage.getItem(KEY) ?? "[]");

function show(list, { video, record, name, text }) {
  const item = document.createElement("li");
  item.append(anchor(video, name, text), ", ", anchor(record, `${name}.json`, "its record"));
  list.prepend(item);
}

function anchor(href, download, text) {
  const link = document.createElement("a");
  Object.assign(link, { href, download, textContent: text });
  return link;
}

export function addSaved(list, saved) {
  sessionStorage.setItem(KEY, JSON.stringify([...stored(), saved]));
  show(list, saved);
}

export function showSaved(list) { for (const saved of stored()) show(list, saved); }
