// The page of hiar serve: one live video over /v1/realtime/video (schema: /v1/schema.json).

import { address, whyNot, withToken } from "./address.js";
import { clearFigures, figure, figures } from "./figures.js";
import { Grid } from "./grid.js";
import { Pace } from "./pace.js";
import { PicturePlayer, VideoPlayer } from "./player.js";
import { addSaved, showSaved } from "./saves.js";
import { $, put, quoted, rounded, seconds } from "./text.js";
import { buildWords, readPrompt } from "./words.js";

const AHEAD = 2; // blocks: with fewer ahead of the screen, the server need not wait for it
const QUIET = 10000, GONE = 20000; // ms without a message, after which the server is asked; and without its answer
const MIME = 'video/mp4; codecs="avc1.640028"';
const VERSION = 1;

const canPlay = (mime) => "MediaSource" in window && MediaSource.isTypeSupported(mime);
let format = address.get("format") ?? (canPlay(MIME) ? "mp4" : "webp");

let info = { words: null, example: "" }; // of the model
let socket = null; // the connection, if there is one
let session = null; // what `ready` said, while the session can go on
let player = null;
let chunks = []; // {seq, block, frame, frames, index, prompt} of what the player holds, rising
let announced = null; // of the chunk whose bytes come next
let acked = -1, whole = -1; // seq
let prompts = []; // {block, index, text} rising
let coming = null; // {block, frame, text}: a prompt that does not show yet
let asked = []; // {type, ...fields}: requests that the server has not answered; sent again in a new connection
let leaving = null; // what comes once the video is saved: stop or start
let next = 0; // the block that comes next, where no chunk is held
let complete = false; // all frames of the video have come
let wanted = true, peek = false; // whether the viewer wants it to play; or, paused, to see the block that he went back to
let tries = 0, retry = null, later = 0; // of the connection: later is what a busy server asked for, ms
let drained = false; // the server has said that it is being stopped
let heardAt = 0, probedAt = null; // ms: of the last message, and of the question whether the server is there
let touched = false; // the viewer holds the slider

const pace = new Pace();
const grid = new Grid($("grid"), $("grid-text"), (block) => go(block));

function say(text) { put("status", text); }
function complain(text) { put("problem", text); }
function link(state, text) { $("link").dataset.state = state; $("link").textContent = text; }

// Connection

function send(type, fields = {}) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...fields }));
}

function ask(type, fields = {}) { // a request that the server answers
  asked.push({ type, ...fields });
  send(type, fields);
}

function answered(type) {
  const first = asked.findIndex((one) => one.type === type);
  if (first >= 0) asked.splice(first, 1);
}

function connect(first) {
  clearTimeout(retry);
  hangUp();
  const url = withToken("/v1/realtime/video");
  url.protocol = url.protocol.replace("http", "ws");
  const mine = new WebSocket(url);
  mine.binaryType = "arraybuffer";
  mine.onopen = () => send("start", { v: VERSION, ...first });
  mine.onmessage = ({ data }) => {
    [heardAt, probedAt] = [performance.now(), null];
    typeof data === "string" ? heard(JSON.parse(data)) : took(data);
    enable();
  };
  mine.onclose = (event) => { if (socket === mine) { lost(event); enable(); } };
  socket = mine;
  [heardAt, probedAt] = [performance.now(), null];
  link("wait", "connecting");
  enable();
}

function watch() { // a network that breaks says nothing
  if (socket === null || session === null) return;
  const now = performance.now(), open = socket.readyState === WebSocket.OPEN;
  if (open && probedAt === null) {
    if (now - heardAt < QUIET) return;
    probedAt = now;
    send(wanted ? "play" : "pause"); // which it answers at once
  } else if (now - (open ? probedAt : heardAt) > GONE) {
    hangUp();
    lost({ code: 1006, reason: "" });
    enable();
  }
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
    say("");
    if (!$("problem").textContent) whyNot().then((words) => { if (socket === null && session === null) complain(words); });
    return;
  }
  const wait = Math.max(later, Math.min(4000, 250 * 2 ** tries++));
  later = 0;
  link("wait", "reconnecting");
  const cause = drained ? "The server is being stopped, and the video goes on when it is back" : "The connection was lost";
  say(`${cause}; trying again in ${seconds(wait / 1000)}.`);
  retry = setTimeout(() => connect({ resume: session.token, after: whole < 0 ? null : whole }), wait);
}

function start() {
  const frames = $("frames").value, [height, width] = $("size").value ? JSON.parse($("size").value) : [null, null];
  leave();
  [wanted, peek] = [true, false];
  say(`Starting: ${quoted($("prompt").value)}.`);
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

function stop() { leave(); say("Stopped."); }

function leaveSaved(then, words) { // what is being saved is not lost; who presses again does not wait
  if (leaving === null && session !== null && asked.some((one) => one.type === "save")) {
    leaving = then;
    say(`The video is being saved, then ${words}.`);
  } else then();
}

function forget() { // the session cannot go on
  if (session !== null) player?.finish();
  session = coming = leaving = null;
  asked = [];
  drained = false;
  for (const id of ["pace", "countdown"]) put(id, "");
  for (const name of ["hiar", "hiar-after"]) sessionStorage.removeItem(name);
}

// Messages

const listeners = {
  ready(message) {
    const again = message.resumed && player !== null && session?.token === message.token;
    if (message.resumed && player === null) wanted = message.playing; // the page was loaded anew
    session = message;
    tries = 0;
    drained = false;
    sessionStorage.setItem("hiar", message.token);
    link("on", "live");
    if (message.mime !== null && !canPlay(message.mime)) {
      format = "webp"; // a profile that this browser does not know
      return start();
    }
    if (!again) fresh(message);
    if (message.init !== null) player.open(message.mime, Uint8Array.from(atob(message.init), (c) => c.charCodeAt(0)));
    pace.begin();
    say(message.resumed ? "Connected again." : `Started: ${quoted(message.prompt)}.`);
    for (const [block, frame, index, text] of message.scheduled) {
      if (block === 0 || block <= newestBlock()) continue;
      asked = asked.filter((one) => one.type !== "prompt" || one.text !== text);
      schedule({ block, frame, prompt_index: index, prompt: text });
    }
    drive(message.playing);
    for (const { type, ...fields } of asked) send(type, fields);
  },
  block(message) { announced = message; },
  prompt_scheduled(message) {
    if (!asked.some((one) => one.type === "prompt")) showPrompt(message.prompt); // before the page was loaded anew
    answered("prompt");
    schedule(message);
  },
  progress(message) { grid.progress(message); },
  moved(message) {
    answered(message.why);
    chunks = chunks.filter((chunk) => chunk.frame < message.frame);
    player.truncate(message.frame);
    grid.back(message.block);
    [next, complete] = [message.block, false];
    pace.begin();
    peek = !wanted && !chunks.length;
    if (peek) drive(false);
    const forked = message.why === "fork"; // else the prompts that come later still do
    if (forked) schedule(message);
    say(`Going on from block ${message.block}${forked ? ` with ${quoted(message.prompt)}` : ""}.`);
  },
  state({ playing }) { drive(playing); },
  saved(message) {
    answered("save");
    addSaved($("saves"), {
      video: withToken(message.url).href, record: withToken(message.url.replace(/content$/, "record")).href,
      name: `hiar-${session.session}-${message.frames}.mp4`,
      text: `Video, ${message.frames} frames, ${seconds(message.seconds)}`,
    });
    say(`Saved ${message.frames} frames.`);
    if (!asked.some((one) => one.type === "save")) leaving?.();
  },
  ended({ reason, frames, resume }) {
    if (reason === "complete") {
      complete = true;
      player.finish();
      put("pace", "");
      return say(`The video is complete: ${frames} frames.`);
    }
    if (resume) return void (drained = true); // it closes the socket
    forget();
    hangUp();
    say(reason === "drained" ? "The server is being stopped." : "Stopped.");
    link("off", "not connected");
  },
  refused({ code, message, closes, retry_after: wait, about }) {
    if (asked.some((one) => one.type === about)) say("");
    answered(about);
    if (about === "save") leaving = null;
    complain(wait === null ? message : `${message} (try again in ${wait} s)`);
    if (["busy", "cannot_resume", "shutting_down"].includes(code)) later = 1000 * (wait ?? 1); // a session that is there waits
    else if (code === "unknown_session" || closes) forget();
    if (about === "start" && !closes) { hangUp(); lost({ code: 1008, reason: message }); } // it would wait for another
  },
};

function heard(message) {
  if (message.type !== "refused" && message.type !== "block" && message.type !== "progress") complain("");
  listeners[message.type]?.(message);
}

function schedule({ block, frame, prompt_index: index, prompt: text }) {
  prompts = [...prompts.filter((p) => p.block < block), { block, index, text }];
  coming = { block, frame, text };
  say(`${quoted(text)} shows from block ${block}.`);
}

function took(data) { // the bytes of the chunk that was announced
  const view = new DataView(data);
  if (announced === null || Number(view.getBigUint64(0)) !== announced.seq) {
    return socket.close(); // out of step: begin again from the last whole chunk
  }
  const { seq, block, first_frame: frame, frames, prompt_index: index, prompt, stats } = announced;
  announced = null;
  whole = seq;
  pace.chunk(stats, chunks.length > 0 && wanted && player.held.end - player.position <= session.frames_per_block);
  chunks = chunks.filter((chunk) => chunk.frame < frame);
  chunks.push({ seq, block, frame, frames, index, prompt });
  if (!prompts.some((p) => p.index === index && p.text === prompt)) {
    const others = prompts.filter((p) => (p.block < block ? p.index < index : p.block > block && p.index > index));
    prompts = [...others, { block, index, text: prompt }].sort((a, b) => a.block - b.block);
  }
  if (frame < player.held.end) player.truncate(frame); // of a fork, the message about which was lost
  player.add(frame, frames, new Uint8Array(data, 8));
  chunks = chunks.filter((chunk) => chunk.frame >= player.held.first);
  if (peek) { peek = false; drive(true); }
  figures(stats);
  put("pace", pace.words(session.frames_per_block, session.fps));
}

function fresh(message) { // another video
  player?.close();
  chunks = [];
  pace.fresh();
  acked = whole = -1;
  [next, complete] = [message.block, false];
  clearFigures();
  prompts = message.scheduled.slice(0, 1).map(([block, , index, text]) => ({ block, index, text }));
  if (message.resumed) fields();
  const moving = message.mime !== null;
  $("video").hidden = !moving;
  $("canvas").hidden = moving;
  $("screen").style.setProperty("--aspect", `${message.width} / ${message.height}`);
  player = moving ? new VideoPlayer($("video"), message.fps) : new PicturePlayer($("canvas"), message.fps);
  if (wanted) player.play(); else player.pause();
  grid.start(message.steps, message.plan, message.block);
  $("model").textContent = message.model;
}

function fields() { // those of the running video, which the page has forgotten
  showPrompt(session.scheduled.at(-1)[3]);
  $("seed").value = session.seed;
  $("frames").value = session.num_frames ?? "";
  $("order").value = session.order;
}

function showPrompt(text) {
  $("prompt").value = text;
  readPrompt(info.words);
}

// The viewer

const newestBlock = () => chunks.at(-1)?.block ?? next - 1;
const oldestBlock = () => chunks[0]?.block ?? next;
const over = () => (complete || session === null) && chunks.length > 0 && player.position >= player.held.end - 1;
const onScreen = () => chunks.findLast((chunk) => chunk.frame <= player.position) ?? chunks[0];

function play(yes) {
  if (yes && over()) go(chunks[0].block);
  if (yes && !wanted) pace.begin();
  wanted = yes;
  if (yes) player?.play(); else player?.pause();
  send(yes ? "play" : "pause");
  enable();
}

function drive(playing) { // the server, which says whether it makes blocks
  if (playing !== (wanted || peek)) send(playing ? "pause" : "play");
}

function go(block) { // to a block: one that is held, or one that the server makes again
  const chunk = chunks.find((one) => one.block === block);
  if (chunk !== undefined) player.seek(chunk.frame);
  else if (session !== null && block < oldestBlock() && block >= 0 && goingTo() !== block) {
    say(`Going back to block ${block}${inHand()}.`);
    ask("seek", { block });
  }
}

const goingTo = () => asked.findLast((one) => one.type === "seek")?.block;
const inHand = () => (wanted && !complete ? ", once the block in hand is made" : "");

function step(blocks) {
  const present = goingTo() ?? onScreen()?.block ?? next, target = Math.min(present + blocks, newestBlock());
  if (target !== present) go(target);
}

function wait(block, frame) { // seconds until a block is on the screen; null: not known yet
  const missing = block - newestBlock();
  const play = Math.max(0, frame - (player.held.end ? player.position : frame)) / session.fps;
  if (missing <= 0) return play;
  const made = pace.until(missing, wanted);
  return made === null ? null : Math.max(play, made);
}

function countdown() { // to the new prompt; where the server is slow, to the next block
  if (session === null || complete || socket?.readyState !== WebSocket.OPEN) return "";
  const slow = pace.seconds * session.fps > 1.05 * session.frames_per_block;
  if (coming === null && (!slow || !wanted || !chunks.length)) return "";
  const { block, frame } = coming ?? { block: newestBlock() + 1, frame: player.held.end };
  const left = wait(block, frame);
  if (left === null) return "";
  if (!wanted) return `Block ${block} shows ${rounded(left)} after Play.`;
  return left < 0.05 ? `Block ${block} is due.` : `Block ${block} shows in ${rounded(left)}.`;
}

function hint() { // in place of a picture
  if (chunks.length) return "";
  if (session === null) return socket === null ? "Choose a prompt and start." : "Connecting.";
  if (complete) return "The video is complete.";
  if (!wanted && !peek) return "Paused.";
  return next ? `Block ${next} is being made.` : "The first block is being made.";
}

function acknowledge() {
  if (!chunks.length) return;
  const position = player.position, late = player.held.end - position < AHEAD * session.frames_per_block;
  const last = late ? chunks.at(-1) : chunks.findLast((chunk) => chunk.frame <= position);
  if (last === undefined || last.seq <= acked || socket?.readyState !== WebSocket.OPEN) return;
  if (whole - acked >= session.window) pace.begin(); // for it, the server has waited
  acked = last.seq;
  send("ack", { seq: acked });
}

function enable() {
  const live = session !== null && socket?.readyState === WebSocket.OPEN, some = chunks.length > 0;
  $("stop").disabled = session === null && socket === null; // a lost connection is not sought for ever
  $("change").disabled = !live;
  for (const id of ["fork", "save"]) $(id).disabled = !live || !some;
  for (const id of ["forward", "newest", "rewind"]) $(id).disabled = !some;
  $("play").disabled = !some && session === null;
  $("back").disabled = !some && !(live && next > 0);
  put("play", wanted && !over() ? "Pause" : "Play");
  put("start", session === null ? "Start" : "Start anew");
}

function show() { // ten times a second: what has changed on the screen
  put("hint", hint());
  watch();
  if (player === null) return;
  if (session !== null) acknowledge();
  put("play", wanted && !over() ? "Pause" : "Play");
  const chunk = onScreen(), total = session?.num_frames ? lastBlock(session) : null;
  if (chunk === undefined) {
    for (const id of ["countdown", "position", "now"]) put(id, "");
    return grid.draw({ shown: null, prompts, coming: coming?.block ?? null, total });
  }
  const position = Math.min(player.position, player.held.end - 1), newest = chunks.at(-1), fps = player.fps;
  if (coming !== null && chunk.block >= coming.block && chunk.prompt === coming.text) {
    say(`Now showing ${quoted(coming.text)}.`);
    coming = null;
  }
  put("countdown", countdown());
  put("position", `block ${chunk.block}, frame ${position}, ${(position / fps).toFixed(1)} s`);
  const name = `${chunk.prompt}, block ${chunk.block}`;
  if ($("now").textContent !== name) {
    put("now", name);
    for (const id of ["video", "canvas"]) $(id).setAttribute("aria-label", `Video: ${chunk.prompt}`);
    if (session !== null) sessionStorage.setItem("hiar-after", chunk.seq - 1); // a page that is loaded anew begins here
  }
  const slider = $("rewind");
  [slider.min, slider.max] = [chunks[0].block, newest.block];
  if (!touched) slider.value = chunk.block;
  slider.setAttribute("aria-valuetext", `block ${slider.value}`);
  figure("blocks", newest.block + 1);
  figure("ahead", seconds(Math.max(0, player.held.end - 1 - position) / fps));
  grid.draw({ shown: chunk.block, prompts, coming: coming?.block ?? null, total });
}

const lastBlock = ({ num_frames: frames, frames_per_block: size }) => Math.ceil(frames / size);

// Controls

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  complain("");
  leaveSaved(start, "another one starts");
});
$("change").addEventListener("click", () => {
  const text = $("prompt").value;
  say(`Asked for ${quoted(text)}${inHand()}.`);
  ask("prompt", { text });
});
$("fork").addEventListener("click", () => {
  const { block } = onScreen(), prompt = $("prompt").value;
  say(`Going back to block ${block} with ${quoted(prompt)}${inHand()}.`);
  ask("fork", { block, prompt });
});
$("save").addEventListener("click", () => { say("Saving."); ask("save"); });
$("stop").addEventListener("click", () => leaveSaved(stop, "it is stopped"));
$("play").addEventListener("click", () => play(!wanted || over()));
$("back").addEventListener("click", () => step(-1));
$("forward").addEventListener("click", () => step(1));
$("newest").addEventListener("click", () => step(Infinity));
$("prompt").addEventListener("input", () => readPrompt(info.words));
$("prompt").addEventListener("keydown", (event) => { // Enter changes the prompt of a running video, and does not end it
  if (event.key !== "Enter" || session === null) return;
  event.preventDefault();
  $("change").click();
});
$("rewind").addEventListener("input", () => { touched = true; go(Number($("rewind").value)); });
for (const name of ["change", "pointerup", "pointercancel", "blur"]) {
  $("rewind").addEventListener(name, () => { touched = false; });
}
$("stage").addEventListener("keydown", (event) => {
  if (event.target !== $("stage") || event.ctrlKey || event.altKey || event.metaKey || $("play").disabled) return;
  const keys = {
    " ": () => play(!wanted || over()), ArrowLeft: () => step(-1), ArrowRight: () => step(1), End: () => step(Infinity),
    Home: () => go(oldestBlock()),
  };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});

async function begin() {
  const token = sessionStorage.getItem("hiar"), after = sessionStorage.getItem("hiar-after");
  if (token !== null) connect({ resume: token, after: after === null ? null : Number(after) }); // it was loaded anew
  showSaved($("saves"));
  enable();
  setInterval(show, 100);
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
  buildWords(info.words);
  if (session?.resumed) $("order").value = session.order; // the choices were not there before
}

begin();
