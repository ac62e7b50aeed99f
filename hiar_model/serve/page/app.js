// The page of hiar serve: one live video over /v1/realtime/video (schema: /v1/schema.json).

import { Grid } from "./grid.js";
import { PicturePlayer, VideoPlayer } from "./player.js";

const AHEAD = 2; // blocks: with fewer ahead of the screen, the server need not wait for it
const MIME = 'video/mp4; codecs="avc1.640028"';
const VERSION = 1;

const $ = (id) => document.getElementById(id);
const address = new URLSearchParams(`${location.search.slice(1)}&${location.hash.slice(1)}`);
const secret = address.get("token");
const withToken = (path) => { // an address of this server, which a proxy may have beneath a path of its own
  const url = new URL(path.replace(/^\//, ""), document.baseURI);
  if (secret !== null) url.searchParams.set("token", secret);
  return url;
};

const canPlayVideo = "MediaSource" in window && MediaSource.isTypeSupported(MIME);
let format = address.get("format") ?? (canPlayVideo ? "mp4" : "webp");

let info = { words: null, example: "" }; // of the model
let socket = null; // the connection, if there is one
let session = null; // what `ready` said, while the session can go on
let player = null;
let chunks = []; // {seq, block, frame, frames, index, prompt} of what the player holds, rising
let announced = null; // of the chunk whose bytes come next
let acked = -1, whole = -1; // seq
let prompts = []; // {block, index, text} rising
let coming = null; // {block, frame, text}: a prompt that does not show yet
let forking = ""; // the prompt of a fork that was asked for
let wanted = true; // whether the viewer wants it to play
let tries = 0, retry = null, later = 0; // of the connection: later is what a busy server asked for, ms
let touched = false; // the viewer holds the slider
let latest = null; // the figures of the last chunk

const grid = new Grid($("grid"), $("grid-text"), (block) => go(block));

// Words

function say(text) { $("status").textContent = text; }
function complain(text) { $("problem").textContent = text; }
function link(state, text) { $("link").dataset.state = state; $("link").textContent = text; }
const quoted = (text) => `“${text}”`;
const seconds = (value) => (value < 0.995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

function buildWords() {
  if (!info.words) return;
  for (const [name, words] of Object.entries(info.words)) {
    const label = document.createElement("label"), select = document.createElement("select");
    label.append(name, select);
    select.id = `word-${name}`;
    for (const word of words) select.append(new Option(word, word));
    select.addEventListener("change", writePrompt);
    $("words").append(label);
  }
  $("words").hidden = false;
  readPrompt();
}

function writePrompt() { // the field, from the choices; "medium" goes without saying
  const word = (name) => ($(`word-${name}`).value === "medium" ? "" : $(`word-${name}`).value);
  const words = [word("size"), word("colour"), word("shape"), "moving", word("direction"), word("speed")];
  const text = words.filter(Boolean).join(" ");
  $("prompt").value = `${"aeiou".includes(text[0]) ? "an" : "a"} ${text}`;
}

function readPrompt() { // the choices, from the field
  if (!info.words) return;
  const text = ` ${$("prompt").value.toLowerCase()} `;
  for (const [name, words] of Object.entries(info.words)) {
    const named = words.filter((word) => text.includes(` ${word} `)).sort((a, b) => b.length - a.length);
    if (named.length) $(`word-${name}`).value = named[0];
    else if (words.includes("medium")) $(`word-${name}`).value = "medium";
  }
}

// Connection

function send(type, fields = {}) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...fields }));
}

function connect(first) {
  clearTimeout(retry);
  hangUp();
  const url = withToken("/v1/realtime/video");
  url.protocol = url.protocol.replace("http", "ws");
  const mine = new WebSocket(url);
  mine.binaryType = "arraybuffer";
  mine.onopen = () => send("start", { v: VERSION, ...first });
  mine.onmessage = ({ data }) => { typeof data === "string" ? heard(JSON.parse(data)) : took(data); enable(); };
  mine.onclose = (event) => { if (socket === mine) { lost(event); enable(); } };
  socket = mine;
  link("wait", "connecting");
}

function hangUp() {
  if (socket === null) return;
  const old = socket;
  socket = null;
  announced = null;
  old.close();
}

function lost({ code, reason }) {
  socket = null;
  announced = null;
  if (code === 1008 && session !== null) { // sent away, such as by another tab that took the session
    complain(reason);
    forget();
  }
  if (session === null) {
    link("off", "not connected");
    if (!$("problem").textContent) complain("No connection: the server is not there, is full, or wants a token.");
    return;
  }
  const wait = Math.max(later, Math.min(4000, 250 * 2 ** tries++));
  later = 0;
  link("wait", "reconnecting");
  say(`The connection was lost; trying again in ${seconds(wait / 1000)}.`);
  retry = setTimeout(() => connect({ resume: session.token, after: whole < 0 ? null : whole }), wait);
}

function start() {
  const frames = $("frames").value, [height, width] = $("size").value ? JSON.parse($("size").value) : [null, null];
  leave();
  wanted = true;
  connect({
    height, width,
    prompt: $("prompt").value, seed: Number($("seed").value), order: $("order").value || null,
    num_frames: frames ? Number(frames) : null, format,
  });
}

function leave() { // the session ends, the frames stay
  send("stop");
  hangUp();
  clearTimeout(retry);
  forget();
  link("off", "not connected");
  enable();
}

function forget() { // the session cannot go on
  if (session !== null && !chunks.length) $("hint").textContent = "Choose a prompt and start.";
  session = null;
  coming = null;
  sessionStorage.removeItem("hiar");
}

// Messages

const listeners = {
  ready(message) {
    const again = message.resumed && player !== null && session?.token === message.token;
    session = message;
    tries = 0;
    sessionStorage.setItem("hiar", message.token);
    link("on", "live");
    if (message.mime !== null && !MediaSource.isTypeSupported(message.mime)) {
      format = "webp"; // a profile that this browser does not know
      return start();
    }
    if (!again) fresh(message);
    if (message.init !== null) player.open(message.mime, Uint8Array.from(atob(message.init), (c) => c.charCodeAt(0)));
    say(message.resumed ? "Connected again." : `Started: ${quoted(message.prompt)}.`);
    if (message.playing !== wanted) send(wanted ? "play" : "pause");
  },
  block(message) { announced = message; },
  prompt_scheduled(message) {
    schedule(message, message.prompt);
    const made = (message.block - (chunks.at(-1)?.block ?? 0)) * (latest?.p50 ?? 0);
    const wait = Math.max(0, (message.frame - player.position) / session.fps, made);
    say(`${quoted(message.prompt)} shows from block ${message.block}, ${seconds(wait)} from now.`);
  },
  progress(message) { grid.progress(message); },
  moved(message) {
    chunks = chunks.filter((chunk) => chunk.frame < message.frame);
    prompts = prompts.filter((p) => p.block <= message.block);
    if (coming !== null && coming.block > message.block) coming = null;
    player.truncate(message.frame);
    grid.back(message.block);
    if (message.why === "fork") schedule(message, forking);
    say(`Going on from block ${message.block}${message.why === "fork" ? ` with ${quoted(forking)}` : ""}.`);
  },
  state({ playing }) { if (playing !== wanted) send(wanted ? "play" : "pause"); },
  saved(message) {
    const item = document.createElement("li"), video = document.createElement("a"), record = document.createElement("a");
    video.href = withToken(message.url);
    record.href = withToken(message.url.replace(/content$/, "record"));
    video.download = `hiar-${session.session}-${message.frames}.mp4`;
    record.download = `${video.download}.json`;
    video.textContent = `Video, ${message.frames} frames, ${seconds(message.seconds)}`;
    record.textContent = "its record";
    item.append(video, ", ", record);
    $("saves").prepend(item);
    say(`Saved ${message.frames} frames.`);
  },
  ended({ reason, frames, resume }) {
    if (reason === "complete") {
      player.finish();
      return say(`The video is complete: ${frames} frames.`);
    }
    if (resume) return say("The server is being stopped; the video goes on when it is back."); // it closes the socket
    forget();
    hangUp();
    say(reason === "drained" ? "The server is being stopped." : "Stopped.");
    link("off", "not connected");
  },
  refused({ code, message, closes, retry_after: wait }) {
    complain(wait === null ? message : `${message} (try again in ${wait} s)`);
    if (["busy", "cannot_resume", "shutting_down"].includes(code)) later = 1000 * (wait ?? 1); // a session that is there waits
    else if (code === "unknown_session" || closes) forget();
  },
};

function heard(message) {
  if (message.type !== "refused" && message.type !== "block" && message.type !== "progress") complain("");
  listeners[message.type]?.(message);
}

function schedule({ block, frame, prompt_index: index }, text) {
  prompts = [...prompts.filter((p) => p.block < block), { block, index, text }];
  coming = { block, frame, text };
}

function took(data) { // the bytes of the chunk that was announced
  const view = new DataView(data);
  if (announced === null || Number(view.getBigUint64(0)) !== announced.seq) {
    return socket.close(); // out of step: begin again from the last whole chunk
  }
  const { seq, block, first_frame: frame, frames, prompt_index: index, prompt, stats } = announced;
  announced = null;
  whole = seq;
  chunks = chunks.filter((chunk) => chunk.frame < frame);
  chunks.push({ seq, block, frame, frames, index, prompt });
  if (!prompts.some((p) => p.index === index)) prompts.push({ block, index, text: prompt });
  if (frame < player.held.end) player.truncate(frame); // of a fork, the message about which was lost
  player.add(frame, frames, new Uint8Array(data, 8));
  chunks = chunks.filter((chunk) => chunk.frame >= player.held.first);
  figures(stats);
}

function fresh(message) { // another video
  player?.close();
  chunks = [];
  latest = null;
  acked = whole = -1;
  $("hint").textContent = "The first block is being made.";
  prompts = message.resumed ? [] : [{ block: 0, index: 0, text: message.prompt }];
  const moving = message.mime !== null;
  $("video").hidden = !moving;
  $("canvas").hidden = moving;
  $("screen").style.setProperty("--aspect", `${message.width} / ${message.height}`);
  player = moving ? new VideoPlayer($("video"), message.fps) : new PicturePlayer($("canvas"), message.fps);
  if (wanted) player.play(); else player.pause();
  grid.start(message.steps, message.plan, message.block);
  $("model").textContent = message.model;
}

// The viewer

const onScreen = () => chunks.findLast((chunk) => chunk.frame <= player.position) ?? chunks[0];

function play(yes) {
  wanted = yes;
  if (yes) player?.play(); else player?.pause();
  send(yes ? "play" : "pause");
  enable();
}

function go(block) { // to a block: one that is held, or one that the server makes again
  const chunk = chunks.find((one) => one.block === block);
  if (chunk !== undefined) player.seek(chunk.frame);
  else if (chunks.length && block < chunks[0].block && block >= 0) send("seek", { block });
}

function step(blocks) {
  const present = onScreen();
  if (present) go(Math.min(present.block + blocks, chunks.at(-1).block));
}

function acknowledge() {
  if (!chunks.length) return;
  const position = player.position, late = player.held.end - position < AHEAD * session.frames_per_block;
  const last = late ? chunks.at(-1) : chunks.findLast((chunk) => chunk.frame <= position);
  if (last === undefined || last.seq <= acked || socket?.readyState !== WebSocket.OPEN) return;
  acked = last.seq;
  send("ack", { seq: acked });
}

function figures(stats) {
  latest = stats;
  const able = stats.p50 ? session.frames_per_block / stats.p50 : Infinity; // frames a second
  $("pace").textContent = able > 0.95 * session.fps ? ""
    : `The server makes ${able.toFixed(able < 1 ? 2 : 1)} frames a second here and the video has ${session.fps}: the picture waits for each block.`;
  const values = {
    fps: `${stats.fps.toFixed(1)} fps`, first: seconds(stats.first_chunk_s), misses: stats.misses,
    p50: stats.p50 === null ? "–" : seconds(stats.p50), p99: stats.p99 === null ? "–" : seconds(stats.p99),
    memory: `${(stats.memory / 2 ** 20).toFixed(0)} MiB`, sessions: stats.sessions,
  };
  for (const [name, value] of Object.entries(values)) figure(name, value);
}

function figure(name, value) { document.querySelector(`[data-figure="${name}"]`).textContent = value; }

function enable() {
  const live = session !== null && socket?.readyState === WebSocket.OPEN, some = chunks.length > 0;
  $("stop").disabled = session === null; // a lost connection is not sought for ever
  $("change").disabled = !live;
  for (const id of ["fork", "save"]) $(id).disabled = !live || !some;
  for (const id of ["play", "back", "forward", "newest", "rewind"]) $(id).disabled = !some;
  $("play").textContent = wanted ? "Pause" : "Play";
  $("start").textContent = session === null ? "Start" : "Start anew";
}

function show() { // ten times a second: what has changed on the screen
  if (player === null) return;
  if (session !== null) acknowledge();
  const chunk = onScreen(), total = session?.num_frames ? newestBlock(session) : null;
  if (chunk === undefined) return grid.draw({ shown: null, prompts, coming: coming?.block ?? null, total });
  const position = Math.min(player.position, player.held.end - 1), newest = chunks.at(-1);
  const fps = player.fps;
  if (coming !== null && chunk.block >= coming.block && chunk.prompt === coming.text) {
    say(`Now showing ${quoted(coming.text)}.`);
    coming = null;
  }
  const words = `block ${chunk.block}, frame ${position}, ${(position / fps).toFixed(1)} s`;
  if ($("position").textContent !== words) $("position").textContent = words;
  const name = `${chunk.prompt}, block ${chunk.block}`;
  if ($("now").textContent !== name) {
    $("now").textContent = name;
    for (const id of ["video", "canvas"]) $(id).setAttribute("aria-label", `Video: ${chunk.prompt}`);
  }
  $("hint").textContent = "";
  const slider = $("rewind");
  slider.min = chunks[0].block;
  slider.max = newest.block;
  if (!touched) slider.value = chunk.block;
  slider.setAttribute("aria-valuetext", `block ${slider.value}`);
  figure("blocks", newest.block + 1);
  figure("ahead", seconds(Math.max(0, player.held.end - 1 - position) / fps));
  grid.draw({ shown: chunk.block, prompts, coming: coming?.block ?? null, total });
}

const newestBlock = ({ num_frames: frames, frames_per_block: size }) => Math.ceil(frames / size);

// Controls

$("form").addEventListener("submit", (event) => { event.preventDefault(); complain(""); start(); });
$("change").addEventListener("click", () => send("prompt", { text: $("prompt").value }));
$("fork").addEventListener("click", () => {
  forking = $("prompt").value;
  send("fork", { block: onScreen().block, prompt: forking });
});
$("save").addEventListener("click", () => { say("Saving."); send("save"); });
$("stop").addEventListener("click", () => { leave(); say("Stopped."); });
$("play").addEventListener("click", () => play(!wanted));
$("back").addEventListener("click", () => step(-1));
$("forward").addEventListener("click", () => step(1));
$("newest").addEventListener("click", () => go(chunks.at(-1).block));
$("prompt").addEventListener("input", readPrompt);
$("rewind").addEventListener("input", () => { touched = true; go(Number($("rewind").value)); });
$("rewind").addEventListener("change", () => { touched = false; });
$("stage").addEventListener("keydown", (event) => {
  if (event.target !== $("stage") || event.ctrlKey || event.altKey || event.metaKey || !chunks.length) return;
  const keys = {
    " ": () => play(!wanted), ArrowLeft: () => step(-1), ArrowRight: () => step(1), End: () => go(chunks.at(-1).block),
    Home: () => go(chunks[0].block),
  };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});

async function begin() {
  try {
    const answer = await fetch(withToken("/v1/info"));
    if (answer.ok) info = await answer.json();
  } catch { /* without it there is a field in place of the choices */ }
  $("model").textContent = info.model ?? "";
  if (!$("prompt").value) $("prompt").value = info.example ?? ""; // it may have been typed meanwhile
  for (const order of info.orders ?? []) $("order").append(new Option(order, order));
  for (const size of info.sizes ?? []) $("size").append(new Option(`${size[1]} × ${size[0]}`, JSON.stringify(size)));
  $("size-label").hidden = (info.sizes ?? []).length < 2;
  [$("frames").min, $("frames").step] = [info.first_frames ?? 1, info.block_frames ?? 1];
  buildWords();
  enable();
  setInterval(show, 100);
  const token = sessionStorage.getItem("hiar"); // the page was loaded again
  if (token !== null && socket === null) connect({ resume: token }); // Start may have been pressed meanwhile
}

begin();
