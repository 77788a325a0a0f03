// What the sections share: elements, controls, what is said, and one owner for what runs.

import { T } from "./sampler.js";

export const $ = (id) => document.getElementById(id);
export const scheme = matchMedia("(prefers-color-scheme: dark)");
export const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
/** The pace: from 1, the noise, to 0, the data. Half of the time belongs to t < 250, where most is decided. */
export const levelAt = (place) => T * place ** 2 - 1;
export const placeOf = (level) => Math.sqrt((level + 1) / T);
export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const channel = new MessageChannel();
channel.port1.start();

/** Let the page react and draw; setTimeout would also wait for 4 ms. */
export function breathe() {
  channel.port2.postMessage(null);
  return new Promise((resolve) => channel.port1.addEventListener("message", resolve, { once: true }));
}

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
      await before;
      if (!run.stopped) await task(run);
      if (this.#run === run) this.#run = null;
      this.changed();
    })();
    this.changed();
    return run.ended;
  }
}

export function inSight(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return bottom > 0 && top < innerHeight;
}

/** Call step(milliseconds) in the next frame, and again while it returns true and the element is in
 * sight. Returns the function that asks for it. */
export function animate(element, step) {
  let before = null, asked = false, inSight = true;
  const ask = () => {
    if (!asked && inSight) requestAnimationFrame(frame);
    asked ||= inSight;
  };
  function frame(now) {
    asked = false;
    const goesOn = element.clientHeight > 0 && step(Math.min(100, now - (before ?? now)));
    before = goesOn ? now : null;
    if (goesOn) ask();
  }
  new IntersectionObserver(([entry]) => {
    inSight = entry.isIntersecting;
    ask();
  }).observe(element);
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

/** What a reader may change in the method, by its name in sampleChanged; noClip is clip: false. */
export const CHANGES = {
  withoutZ: "leave out the fresh noise of each step",
  noClip: "do not keep the estimate within the range of the data",
  short: "use only 100 noise levels in place of 1000",
  lastNoise: "add noise in the last step",
};

/** Make a box for each change, for `bind`, before the paragraph that will say what they do. */
export function offerChanges(fieldset, prefix) {
  for (const [name, text] of Object.entries(CHANGES)) {
    const label = fieldset.appendChild(document.createElement("label"));
    label.append(Object.assign(document.createElement("input"), { type: "checkbox", id: prefix + name }), ` ${text}`);
  }
}

/** {withoutZ, ...} of a state, for sampleChanged, and the names of those that are ticked. */
export function changesOf(state) {
  const changes = Object.fromEntries(Object.keys(CHANGES).map((name) => [name, state[name]]));
  return [{ ...changes, clip: !state.noClip }, Object.keys(CHANGES).filter((name) => state[name])];
}
