// One reverse process at a time, with the network of the page, for the sections that use it.

import { $, Owner, announce, pause } from "./common.js";
import { guided, sampleChanged } from "./sampler.js";

export const work = new Owner(() => followers.forEach((call) => call()));
export let network = null; // the open Network
const followers = []; // what is called when the work begins or ends

export function follow(call) {
  followers.push(call);
}

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

/** Run the reverse process, and call `each` with every step. The status says how it ends. */
export function reverse(status, what, model, drawNoise, betas, options, each) {
  return work.start(async (run) => {
    const { steps } = options, began = performance.now();
    let done = 0, milliseconds = 0;
    const epsModel = async (x, t) => {
      const asked = performance.now(), eps = await model(x, t);
      milliseconds += performance.now() - asked;
      return eps;
    };
    try {
      for await (const step of sampleChanged(epsModel, drawNoise, betas, options)) {
        if (run.stopped) break; // while eps was computed
        done++;
        each(step, milliseconds / done, done === steps);
        tell([status], `${what}: step ${done} of ${steps}`, { passes: true });
        await pause(0); // lets the page paint
        if (run.stopped) break;
      }
      if (run.stopped && work.busy) return; // another run has begun
      const seconds = ((performance.now() - began) / 1000).toFixed(1);
      tell([status], done === steps ? `${what}: ${steps} step${steps > 1 ? "s" : ""} in ${seconds} s`
        : `Stopped after step ${done} of ${steps}.`);
    } catch (error) {
      tell([status], explained(error), { isError: true });
    }
  });
}

/** What an error of the network means for the user. */
function explained(error) {
  const message = error.message.split("\n")[0];
  if (/out of memory|bad_alloc|allocation failed|memory access/i.test(message)) {
    return `The network does not fit in this browser's memory; try fewer images. (${message})`;
  }
  return `The network failed: ${message}`;
}

/** The epsModel of `count` images. value: a class, or "all", which means all in turn. */
export function modelOf(value, count, w) {
  const own = network, n = own.classes.length;
  if (!n) return (x, t) => own.eps(x, t);
  return guided(own, Array.from({ length: count }, (_, k) => value === "all" ? k % n : Number(value)), w);
}
