// What dissolves into noise and comes back: the points of a plane, or pictures. A place, from 0
// (the data) to 1 (the noise), tells how far it is.

import { T, levelsOf, noiseOf, partsAt, reverse, stateAt } from "./sampler.js";

export class Passage {
  x0 = null; // the data, or null: then x_t is noise until something has come back
  noise = null;
  steps = null; // those of the way back that are done; a last one with t = -1 has the result

  /** eps(x, t): the network, or null. options: steps, of a way back; clip; keepsData, whether each
   * round begins with the same data; recorded(place), what replaces eps on a way back from there.
   * The gesture sets changed(error), which is called after each step, or when eps has failed. */
  constructor(eps, options) {
    Object.assign(this, { eps, options });
  }

  /** Use another network. A way back that has waited for it begins. */
  use(eps) {
    const { isWaiting } = this;
    this.eps = eps;
    if (!isWaiting) return;
    this.steps = null;
    this.sendBack(this.from);
  }

  /** Whether a way back has been asked for before its network is there. */
  get isWaiting() {
    return this.steps !== null && !this.eps && !this.steps.length;
  }

  /** Half of the way belongs to the lowest quarter of the levels, where most is decided. */
  levelAt(place) {
    return T * place ** 2 - 1;
  }

  /** Begin with these data and this noise. */
  begin(x0, noise) {
    Object.assign(this, { x0, noise, steps: null });
  }

  /** Begin a round with what the network has brought back whole, or with the same data. */
  renew(seed) {
    const x0 = (!this.options.keepsData && this.result) || this.x0;
    this.begin(x0, noiseOf(seed, 1, this.noise.length));
  }

  /** What has come back, if the way back is complete. */
  get result() {
    const last = this.steps?.at(-1);
    return last?.t === -1 ? last.x0 : null;
  }

  /** The lowest place that the way back has reached. */
  get reached() {
    if (!this.steps || this.result) return 0;
    const level = this.steps.length ? this.levels[this.steps.length] ?? 0 : Infinity;
    return Math.min(this.from, Math.sqrt((level + 1) / T) + 1e-6);
  }

  /** {x, x0, level} at a place; x0 is the data, or the estimate on the way back. */
  at(place) {
    const level = this.levelAt(place), { steps, x0, noise, xT } = this;
    if (!steps && !x0) return { x: noise, x0: noise, level };
    const [signal, spread] = partsAt(level);
    if (!steps) return { x: x0.map((it, k) => signal * it + spread * noise[k]), x0, level }; // (4)
    if (!steps.length) return { x: xT, x0: xT, level: this.levelAt(this.from) };
    return stateAt(steps, level);
  }

  /** Begin the way back at a place; without data, at the noise. */
  sendBack(begin) {
    const place = this.x0 ? begin : 1;
    const { options } = this, t = Math.max(0, Math.round(this.levelAt(place)));
    const levels = levelsOf(t, Math.min(options.steps, t + 1));
    const xT = this.at(place).x, steps = [];
    Object.assign(this, { xT, from: place, levels, steps });
    const eps = options.recorded?.(place) ?? this.eps;
    if (eps) this.#sample(eps);
  }

  async #sample(eps) {
    const { xT, options, steps, levels } = this;
    try {
      for await (const step of reverse(eps, xT, levels[0], levels.length, options.clip)) {
        if (steps !== this.steps) return; // another way back has begun
        steps.push(step);
        this.changed();
        await new Promise((resolve) => setTimeout(resolve)); // so that nothing on the page stalls
      }
      if (steps !== this.steps) return;
      const { x0 } = steps.at(-1);
      steps.push({ t: -1, s: -2, x: x0, x0, end: x0 });
      this.changed();
    } catch (error) {
      if (steps !== this.steps) return;
      this.steps = null;
      this.changed(error);
    }
  }
}
