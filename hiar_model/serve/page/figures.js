// The figures below the video.

import { seconds } from "./text.js";

const shown = (value) => (value === null ? "–" : seconds(value));

export function figure(name, value) { document.querySelector(`[data-figure="${name}"]`).textContent = value; }

export function clearFigures() {
  for (const value of document.querySelectorAll("[data-figure]")) value.textContent = "–";
}

export function figures(stats) { // of a chunk
  const values = {
    fps: `${stats.fps.toFixed(1)} fps`, first: seconds(stats.first_chunk_s), misses: stats.misses,
    p50: shown(stats.p50), p99: shown(stats.p99),
    memory: `${(stats.memory / 2 ** 20).toFixed(0)} MiB`, sessions: stats.sessions,
  };
  for (const [name, value] of Object.entries(values)) figure(name, value);
}
