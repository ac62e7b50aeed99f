// The prompt of the toy world in words to choose from: the field follows the choices, and the choices the field.

import { $ } from "./text.js";

function write() { // the field, from the choices; "medium" goes without saying
  const word = (name) => ($(`word-${name}`).value === "medium" ? "" : $(`word-${name}`).value);
  const words = [word("size"), word("colour"), word("shape"), "moving", word("direction"), word("speed")];
  const text = words.filter(Boolean).join(" ");
  $("prompt").value = `${"aeiou".includes(text[0]) ? "an" : "a"} ${text}`;
}

export function readPrompt(slots) { // the choices, from the field
  if (!slots) return;
  const text = ` ${$("prompt").value.toLowerCase()} `;
  for (const [name, words] of Object.entries(slots)) {
    const named = words.filter((word) => text.includes(` ${word} `)).sort((a, b) => b.length - a.length);
    if (named.length) $(`word-${name}`).value = named[0];
    else if (words.includes("medium")) $(`word-${name}`).value = "medium";
  }
}

export function buildWords(slots) { // slots: {name: words}; none: the prompt is free
  if (!slots) return;
  for (const [name, words] of Object.entries(slots)) {
    const label = document.createElement("label"), select = document.createElement("select");
    label.append(name, select);
    select.id = `word-${name}`;
    for (const word of words) select.append(new Option(word, word));
    select.addEventListener("change", write);
    $("words").append(label);
  }
  $("words").hidden = false;
  readPrompt(slots);
}
