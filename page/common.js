// What the sections share: elements, controls, what is said, and one owner for what runs.

import { T } from "./sampler.js";

export const $ = (id) => document.getElementById(id);
export const scheme = matchMedia("(prefers-color-scheme: dark)");
export const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
/** The pace: from 1, the noise, to 0, the data. Half of the time belongs to t < 250, where most is decided. */
export const levelAt = (place) => T * place ** 2 - 1;
export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/**
 * Let controls show and change a state. The control of a key has the id prefix + key, and may be
 * absent. changed(key) is called after a change. Returns a function that shows the state.
 */
export function bind(state, prefix, changed) {
  const controls = Object.keys(state).map((key) => [key, $(prefix + key)]).filter(([, control]) => control);
  for (const [key, control] of controls) {
    control.autocomplete = "off"; // the browser would restore the control, but not the state
    control.addEventListener(control.type === "range" ? "input" : "change", () => {
      const value = control.type === "checkbox" ? control.checked : control.value;
      state[key] = typeof state[key] === "number" ? Number(value) : value;
      changed(key);
    });
  }
  const show = () => {
    for (const [key, control] of controls) {
      if (control.type === "checkbox") control.checked = state[key];
      else if (control !== document.activeElement || control.type !== "number") control.value = state[key];
    }
  };
  show();
  return show;
}

/** An owner of what runs: start(task) ends the task before, waits for it, and calls task(run), which
 * ends soon after run.stopped. Of several starts at the same time, only the last one happens. */
export class Owner {
  #run = null;

  constructor(changed = () => {}) {
    this.changed = changed;
  }

  /** Whether something runs that nobody has stopped. */
  get busy() {
    return this.#run !== null && !this.#run.stopped;
  }

  stop() {
    if (this.#run) this.#run.stopped = true;
    this.changed();
    return this.#run?.ended;
  }

  start(task) {
    const before = this.stop(), run = this.#run = { stopped: false };
    run.ended = (async () => {
      await before?.catch(() => {}); // who started it learns of its error
      try {
        if (!run.stopped) await task(run);
      } finally {
        if (this.#run === run) this.#run = null;
        this.changed();
      }
    })();
    this.changed();
    return run.ended;
  }
}

/** Call call(isSeen) when an element comes into sight, or leaves it. */
export function follow(element, call) {
  new IntersectionObserver(([entry]) => call(entry.isIntersecting)).observe(element);
}

/** Call step(milliseconds) in the next frame, and again while it returns true and the element is in
 * sight. Returns the function that asks for it. */
export function animate(element, step) {
  let before = null, asked = false, isSeen = false;
  const ask = () => {
    if (!asked && isSeen) requestAnimationFrame(frame);
    asked ||= isSeen;
  };
  function frame(now) {
    asked = false;
    const goesOn = element.clientHeight > 0 && step(Math.min(100, now - (before ?? now)));
    before = goesOn ? now : null;
    if (goesOn) ask();
  }
  follow(element, (value) => {
    isSeen = value;
    ask();
  });
  new ResizeObserver(ask).observe(element);
  scheme.addEventListener("change", ask);
  return ask;
}

let waiting;

/** Say something to those who do not see it: the last of what is said within a second. */
export function announce(text) {
  clearTimeout(waiting);
  waiting = setTimeout(() => { $("live").textContent = text; }, 1000);
}
