// One reverse process at a time, with the network of the page, for the sections that use it.

import { $, Owner, announce, pause } from "./common.js";
import { NetworkError } from "./network.js";
import { guided, sampleProgressive } from "./sampler.js";

export const work = new Owner();
export let network = null; // the open Network

export function useNetwork(opened) {
  network = opened;
}

/** Write to the status lines with these ids; those who do not see them hear what is not passing. */
export function tell(ids, text, { isError = false, passes = false } = {}) {
  for (const id of ids) {
    $(id).textContent = text;
    $(id).classList.toggle("error", isError);
  }
  if (!passes) announce(text);
}

/** Run the reverse process, and call each(step, isLast). The status says how it ends. */
export function reverse(status, what, model, drawNoise, betas, options, each) {
  return work.start(async (run) => {
    const { steps } = options, began = performance.now();
    let done = 0;
    try {
      for await (const step of sampleProgressive(model, drawNoise, betas, options)) {
        if (run.stopped) break; // while eps was computed
        each(step, ++done === steps);
        tell([status], `${what}: step ${done} of ${steps}`, { passes: true });
        await pause(0); // lets the page paint
        if (run.stopped) break;
      }
    } catch (error) {
      if (!(error instanceof NetworkError)) throw error;
      return tell([status], `The network failed: ${error.message.split("\n")[0]}`, { isError: true });
    }
    if (run.stopped && work.busy) return; // another run has begun
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    tell([status], done === steps ? `${what}: ${steps} step${steps > 1 ? "s" : ""} in ${seconds} s`
      : `Stopped after step ${done} of ${steps}.`);
  });
}

/** The epsModel of `count` images. value: a class, or "all", which means all in turn. */
export function modelOf(value, count, w) {
  const own = network, n = own.classes.length;
  if (!n) return (x, t) => own.eps(x, t);
  return guided(own, Array.from({ length: count }, (_, k) => value === "all" ? k % n : Number(value)), w);
}
