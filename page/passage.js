// What dissolves into noise and comes back: the points of a plane, or pictures. A place, from 0
// (the data) to 1 (the noise), tells how far it is.

import { pause } from "./common.js";
import { BETAS, alphasBar, between, levelsOf, noiseOf, partsAt, reverse } from "./sampler.js";

export class Passage {
  x0 = null; // with the noise, it makes x_t (4); without data, there is only the noise
  noise = null;
  steps = null; // of the way back, from its beginning down: {t, x, x0}; the result has t = -1

  /** eps(x, t): the network, or null while there is none. options: steps; scales, whether fewer are
   * taken from less noise; betas; clip; keepsData, whether each round begins with the same data;
   * recorded(place), what takes the place of eps on a way back from there, if anything does.
   * changed(error), of its gesture, is called after each step, or when eps has failed. */
  constructor(eps, options) {
    this.use(eps, { betas: BETAS, ...options });
  }

  /** Use another network, or other options. A way back that has waited for the network begins. */
  use(eps, options) {
    const { isWaiting } = this;
    Object.assign(this, { eps, options: { ...this.options, ...options } });
    this.abars = alphasBar(this.options.betas);
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
    return this.abars.length * place ** 2 - 1;
  }

  /** Begin with these data and this noise. */
  begin(x0, noise) {
    Object.assign(this, { x0, noise, steps: null });
  }

  /** Begin a round with what has come back, or with the same data where nothing whole has. */
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
    return Math.min(this.from, Math.sqrt((level + 1) / this.abars.length) + 1e-6);
  }

  /** {x, x0, level} at a place, x0 being the estimate. Between two steps, it moves as by DDIM. */
  at(place) {
    const level = this.levelAt(place), { steps, abars, x0, noise, xT } = this;
    if (!steps && !x0) return { x: noise, x0: noise, level };
    const [signal, spread] = partsAt(level, abars);
    if (!steps) return { x: x0.map((it, k) => signal * it + spread * noise[k]), x0, level }; // (4)
    if (!steps.length) return { x: xT, x0: xT, level: this.levelAt(this.from) };
    const step = steps.findLast(({ t }) => t >= level) ?? steps[0];
    return { x: between(step, level, abars), x0: step.x0, level };
  }

  /** Begin the way back at a place; without data, at the noise. */
  sendBack(begin) {
    const place = this.x0 ? begin : 1;
    const { options } = this, t = Math.max(0, Math.round(this.levelAt(place)));
    const wanted = options.scales ? Math.ceil(options.steps * place) : options.steps;
    const levels = levelsOf(t + 1, Math.min(wanted, t + 1)), xT = this.at(place).x, steps = [];
    Object.assign(this, { xT, from: place, levels, steps });
    const eps = options.recorded?.(place) ?? this.eps;
    if (eps) this.#sample(eps, options.betas.slice(0, t + 1));
  }

  async #sample(eps, betas) {
    const { xT, options, steps, levels } = this;
    try {
      for await (const step of reverse(eps, xT, betas, levels.length, options.clip)) {
        if (steps !== this.steps) return; // another way back has begun
        steps.push(step);
        this.changed();
        await pause(0); // so that nothing on the page stalls
      }
      if (steps !== this.steps) return;
      const { x0 } = steps.at(-1);
      steps.push({ t: -1, x: x0, x0 });
      this.changed();
    } catch (error) {
      if (steps !== this.steps) return;
      this.steps = null;
      this.changed(error);
    }
  }
}
