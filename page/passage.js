// What dissolves into noise and comes back: the points of a plane, or a picture.

import { Owner, levelAt, pause } from "./common.js";
import { BETAS, between, noiseOf, partsAt, respaced, sampleProgressive } from "./sampler.js";

const SLICE = 12; // milliseconds of work at a time, so that nothing on the page stalls

/** x_t at every place, from 0 (the data) to 1 (the noise). */
export class Passage {
  x0 = null; // with the noise, it makes x_t on the way to the noise (4)
  noise = null;
  steps = null; // of the way back, from its beginning down: {t, x, x0}; the result has t = -1
  #sampling = new Owner();

  /**
   * eps(x, t): the network, or null as long as there is none. options: {sampler, steps}, of
   * sampleProgressive. changed(error): what is called when there are more steps, or eps has failed.
   */
  constructor(eps, options, changed) {
    Object.assign(this, { eps, options, changed });
  }

  /** Begin with these data and this noise. */
  begin(x0, noise) {
    this.stop();
    Object.assign(this, { x0, noise, steps: null });
  }

  stop() {
    return this.#sampling.stop();
  }

  /** Whether nothing is missing of the way back. */
  get isComplete() {
    return !this.steps || !this.eps || this.steps.length > (this.jumps ? 0 : this.tau.length);
  }

  /** {x, x0, level} at a place, x0 being the estimate; on the way back, as far as the steps have come. */
  at(place) {
    const wanted = levelAt(place), { steps } = this;
    if (!steps) {
      const [signal, spread] = partsAt(wanted), { x0, noise } = this;
      return { x: x0.map((value, k) => signal * value + spread * noise[k]), x0, level: wanted };
    }
    if (!steps.length) return { x: this.xT, x0: this.xT, level: levelAt(this.from) };
    if (this.jumps) { // straight on to the first estimate
      const [{ x, x0 }] = steps, rest = place / this.from;
      return { x: x0.map((value, k) => value + rest * (x[k] - value)), x0, level: wanted };
    }
    const level = Math.max(wanted, this.tau[steps.length] ?? -1);
    const step = steps.findLast(({ t }) => t >= level) ?? steps[0];
    return this.options.sampler === "ddim" ? { x: between(step, level), x0: step.x0, level }
      : { x: step.x, x0: step.x0, level: step.t }; // which jumps from step to step
  }

  /** Begin the way back at a place. jumps: whether it ends at the first estimate. */
  sendBack(place, jumps = false) {
    Object.assign(this, { jumps, xT: this.at(place).x, from: place });
    this.sample();
  }

  /** Take the way back, perhaps again, from where it began. */
  sample() {
    const t = Math.max(0, Math.round(levelAt(this.from))), { eps, xT } = this, { sampler } = this.options;
    const betas = BETAS.slice(0, t + 1), count = Math.min(this.options.steps, t + 1), steps = this.steps = [];
    this.tau = respaced(betas, count).tau.reverse();
    this.#sampling.start(async (run) => {
      if (!eps) return;
      const options = { sampler, steps: count, xT }, drawNoise = noiseOf(7, 1, xT.length);
      let end = performance.now() + SLICE;
      for await (const step of sampleProgressive(eps, drawNoise, betas, options)) {
        if (run.stopped) return;
        steps.push(step);
        if (this.jumps) break;
        if (performance.now() < end) continue;
        this.changed();
        await pause(0);
        if (run.stopped) return;
        end = performance.now() + SLICE;
      }
      if (!this.jumps) steps.push({ t: -1, x: steps.at(-1).x0, x0: steps.at(-1).x0 });
      this.changed();
    }).catch((error) => {
      this.eps = null; // as if there were no network; the last step stays
      this.changed(error);
    });
  }
}
