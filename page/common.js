// What the sections share: elements, frames, what is said, and owners of what runs.

export const $ = (id) => document.getElementById(id);
export const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
export const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** An owner of what runs: start(task) ends the task before and calls task(run), which ends soon after
 * run.stopped, and then nobody hears of its error. */
export class Owner {
  #run = { stopped: true };

  stop() {
    this.#run.stopped = true;
  }

  async start(task) {
    this.stop();
    const run = this.#run = { stopped: false };
    try {
      await task(run);
    } catch (error) {
      if (!run.stopped) throw error;
    }
  }
}

/** Call call(isSeen) when an element comes into sight, or leaves it. share: of it that must be seen. */
export function follow(element, call, share = 0) {
  const isSeen = (entry) => entry.isIntersecting && entry.intersectionRatio >= share;
  new IntersectionObserver((entries) => call(isSeen(entries.at(-1))), { threshold: [0, share] }).observe(element);
}

/** Call choose(-1 or 1) at the keys up and down of a slider, which left and right move. */
export function onTurn(slider, choose) {
  slider.onkeydown = (event) => {
    const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!turn) return;
    event.preventDefault();
    choose(turn);
  };
}

/** Call call() when a stage comes into sight, or already the section before it, so that the reader need not wait. */
export function whenNear(before, stage, call) {
  for (const name of [before, stage]) follow($(name), (isSeen) => isSeen && call(), 0.4);
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
  return ask;
}

let waiting;

/** Say something to those who do not see it: the last of what is said within a second. */
export function announce(text) {
  clearTimeout(waiting);
  waiting = setTimeout(() => { $("live").textContent = text; }, 1000);
}
