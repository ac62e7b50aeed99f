// How fast blocks come, as far as a page can tell: the server says how long it makes one, the network adds its part.

export class Pace {
  constructor() { this.fresh(); }

  fresh() { // another video
    this.latest = null; // the figures of the last chunk
    this.spacing = 0; // seconds between the last two chunks
    this.dry = 0; // how many chunks in a row came when the screen had run dry
    this.begin();
  }

  begin() { this.begun = performance.now(); } // the next block is begun now

  chunk(stats, dry) {
    this.latest = stats;
    this.spacing = (performance.now() - this.begun) / 1000;
    this.dry = dry ? this.dry + 1 : 0;
    this.begin();
  }

  get seconds() { // of a block; null: not known yet
    const made = this.latest?.p50 ?? this.latest?.first_chunk_s ?? null;
    return made === null ? null : Math.max(made, this.dry ? this.spacing : 0);
  }

  until(blocks, making) { // seconds until so many more have come; making: whether the server is at it
    const passed = making ? Math.min(this.seconds, (performance.now() - this.begun) / 1000) : 0;
    return this.seconds === null ? null : blocks * this.seconds - passed;
  }

  words(frames, fps) { // why the picture waits, if it does; frames: of a block
    const able = (time) => (time ? frames / time : Infinity); // frames a second
    const made = able(this.latest?.p50), came = this.dry > 2 ? able(this.spacing) : Infinity;
    const slow = Math.min(made, came);
    if (slow > 0.95 * fps) return "";
    const who = made <= 0.95 * fps ? "The server makes" : "The network brings";
    const shown = who === "The server makes" ? made : came;
    return `${who} ${shown.toFixed(shown < 1 ? 2 : 1)} frames a second here and the video has ${fps}: `
      + "the picture waits for each block.";
  }
}
