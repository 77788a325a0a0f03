// What dissolves into noise and comes back: the points of a plane, or pictures. A place, from 0 (the
// data) to 1 (the noise), tells how far it is.

import { Owner, pause } from "./common.js";
import { BETAS, alphasBar, between, levelsOf, noiseOf, qSample, reverse } from "./sampler.js";

const SLICE = 12; // milliseconds of work at a time, so that nothing on the page stalls

/** x_t at every place. */
export class Passage {
  x0 = null; // with the noise, it makes x_t on the way to the noise (4)
  noise = null;
  steps = null; // of the way back, from its beginning down: {t, x, x0}; the result has t = -1
  #sampling = new Owner();

  /**
   * eps(x, t): the network, or null while there is none. options: those of reverse; betas; scales:
   * whether fewer steps lead back from less noise; keepsData: whether it begins anew with the same data.
   * changed(error): called when there are more steps, or when eps has failed.
   */
  constructor(eps, options, changed) {
    this.changed = changed;
    this.use(eps, { betas: BETAS, ...options });
  }

  /** Use another network, or other options. */
  use(eps, options) {
    this.eps = eps;
    this.options = { ...this.options, ...options };
    this.abars = alphasBar(this.options.betas);
  }

  /** The pace: half of the way belongs to the lowest quarter of the levels, where most is decided. */
  levelAt(place) {
    return this.options.betas.length * place ** 2 - 1;
  }

  /** Begin with these data and this noise. */
  begin(x0, noise) {
    this.stop();
    Object.assign(this, { x0, noise, steps: null, jumps: false });
  }

  /** Begin with what has come back so far, or again with the same data: after a jump, or where they are kept. */
  renew(seed) {
    const isNew = !this.options.keepsData && !this.jumps && this.steps?.length;
    this.begin(isNew ? this.steps.at(-1).x0 : this.x0, noiseOf(seed, 1, this.x0.length)());
  }

  stop() {
    this.#sampling.stop();
  }

  /** The lowest place that the way back has reached. Without a network, nobody waits for it. */
  get reached() {
    if (!this.steps || !this.eps) return 0;
    if (this.jumps) return this.steps.length ? 0 : this.from;
    const level = this.steps.length ? this.levels[this.steps.length] ?? -1 : Infinity;
    const isEnd = this.steps.at(-1)?.t === -1;
    return isEnd ? 0 : Math.min(this.from, Math.sqrt((level + 1) / this.options.betas.length) + 1e-6);
  }

  get isComplete() {
    return this.reached === 0;
  }

  /** {x, x0, level} at a place, x0 being the estimate. Below the last step of the way back, it is what a jump
   * from there leads to. */
  at(place) {
    const wanted = this.levelAt(place), { steps, abars } = this;
    if (!steps) return { x: qSample(this.x0, wanted, this.noise, abars), x0: this.x0, level: wanted };
    if (!steps.length) return { x: this.xT, x0: this.xT, level: this.levelAt(this.from) };
    if (this.jumps) { // straight on to the first estimate
      const [{ x, x0 }] = steps, rest = place / this.from;
      return { x: x0.map((value, k) => value + rest * (x[k] - value)), x0, level: wanted };
    }
    const step = steps.findLast(({ t }) => t >= wanted) ?? steps[0];
    return this.options.sampler === "ddim" || wanted < (this.levels[steps.length] ?? -1)
      ? { x: between(step, wanted, abars), x0: step.x0, level: wanted }
      : { x: step.x, x0: step.x0, level: step.t }; // the other samplers jump from step to step
  }

  /** Begin the way back at a place. jumps: whether it ends at the first estimate. */
  sendBack(place, jumps = false) {
    Object.assign(this, { jumps: jumps || this.options.steps === 1, xT: this.at(place).x, from: place });
    this.sample();
  }

  /** Take the way back, perhaps again, from where it began. */
  sample() {
    const { eps, xT, options } = this, t = Math.max(0, Math.round(this.levelAt(this.from)));
    const wanted = options.scales ? Math.ceil(options.steps * this.from) : options.steps;
    const betas = options.betas.slice(0, t + 1), count = Math.min(wanted, t + 1), steps = this.steps = [];
    this.levels = levelsOf(t + 1, count);
    this.#sampling.start(async (run) => {
      if (!eps) return;
      const draw = noiseOf(7, 1, xT.length), drawNoise = () => (steps.length ? draw() : xT);
      let end = performance.now() + SLICE;
      for await (const step of reverse(eps, drawNoise, betas, { ...options, steps: count })) {
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
