// Elements by their id, and how things are said.

export const $ = (id) => document.getElementById(id);

export function put(id, text) { if ($(id).textContent !== text) $(id).textContent = text; }

export const quoted = (text) => `“${text}”`;

export const seconds = (value) => (value < 0.995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

export function rounded(value) { // seconds, as one says them beforehand
  return value < 10 ? `${value.toFixed(1)} s` : value < 90 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
}
