// Points in a plane that dissolve into noise and come back along the exact arrows.

import { Passage } from "./passage.js";
import { clear, colours, drawArrow, drawArrows, drawDots, drawHaze, drawLine, drawRing, grid, viewOf } from "./plane.js";
import { STD, exactEps, moons, nearest, posterior } from "./points.js";
import { ABAR, between, noiseOf, partsAt } from "./sampler.js";

export const DATA = moons(), N = DATA.length / 2;
const ROWS = 13; // of arrows
const HAZE = 0.045; // the deviation of the data in the haze, so that it is seen

export class Scene extends Passage {
  /** The data are DATA. limit: of the view, upwards. every: of how many points one shows its path. arrows:
   * whether a field of them is shown. alpha: of those that are not chosen. */
  constructor(canvas, { limit, every = Infinity, arrows = false, alpha = 0.9, ...options }, changed) {
    super((x, t) => exactEps(x, ABAR[t], DATA, STD), options, changed);
    Object.assign(this, { canvas, limit, every, arrows, alpha });
    this.begin(DATA, noiseOf(1, 1, 2 * N)());
  }

  // ---- the drawing

  /** chosen: the point whose origins are shown, or -1. */
  draw(place, chosen = -1) {
    const { x, level } = this.at(place), [signal] = partsAt(level), { clientWidth, clientHeight } = this.canvas;
    const [right, up] = chosen < 0 ? [0, 0] : pointOf(x, chosen).map(Math.abs);
    this.seen = Math.max(this.limit, 1.08 * up, (Math.max(1.2, 1.08 * right) * clientHeight) / clientWidth); // the data and the chosen point are always in the view
    const plane = clear(this.canvas, this.seen);
    const isBack = this.steps !== null, shrunk = DATA.map((value) => value * signal);
    const small = scaleOf(plane);
    drawHaze(plane, signal ** 2, DATA, HAZE);
    drawDots(plane, shrunk, 1.6 * small, colours.dim, 0.5);
    if (this.arrows && isBack && place) {
      const places = grid(plane, ROWS), eps = exactEps(places, signal ** 2, DATA, STD);
      drawArrows(plane, places, eps.map((value) => -value), colours.arrow, (0.75 * plane.height) / ROWS);
    }
    const colourOf = (label) => (label ? colours.data : colours.other); // of its origin
    for (let k = 0; isBack && k < N; k += this.every) {
      drawLine(plane, [...this.#path(k, level), pointOf(x, k)], colourOf(DATA.labels[k]), 1.2 * small, 0.55);
    }
    for (const [size, alpha] of [[10, 0.12], [3.2, 1]]) { // each point glows
      for (const label of [0, 1]) drawDots(plane, x, size * small, colourOf(label), alpha * this.alpha, (k) => DATA.labels[k] === label);
    }
    if (chosen < 0) return;
    if (isBack) drawLine(plane, [...this.#path(chosen, level), pointOf(x, chosen)], colours.lit, 2.2 * small);
    if (place) drawOrigins(plane, pointOf(x, chosen), this.weightsOf(chosen, place), shrunk);
    drawDots(plane, pointOf(x, chosen), 5.5 * small, colours.ink);
    drawDots(plane, pointOf(x, chosen), 4 * small, colours.lit);
  }

  /** The places of point k on its way back, above a level. DDIM moves it smoothly between two steps. */
  #path(k, level) {
    const { steps, xT } = this, places = [];
    if (this.jumps || !steps.length) return [pointOf(xT, k)];
    const parts = this.options.sampler === "ddim" ? Math.ceil(60 / steps.length) : 1;
    steps.filter(({ t }) => t > level).forEach(({ t, x, x0 }, i) => {
      const end = Math.max(level, steps[i + 1]?.t ?? level);
      for (let part = 0; part < parts; part++) {
        const step = { t, x: pointOf(x, k), x0: pointOf(x0, k) };
        places.push(between(step, t + ((end - t) * part) / parts));
      }
    });
    return places;
  }

  // ---- a point

  /** Put point k to a position of the view, by other noise. */
  pull(k, position, place) {
    const [signal, spread] = partsAt(this.levelAt(place));
    this.begin(this.x0, this.noise.map((value, i) => (i >> 1 === k ? (position[i % 2] - signal * this.x0[i]) / spread : value)));
  }

  /** The probabilities of the origins of point k. */
  weightsOf(k, place) {
    const { x, level } = this.at(place), [signal] = partsAt(level);
    return posterior(...pointOf(x, k), signal ** 2, DATA, STD);
  }

  /** What the lines of point k show, or an empty string where there are none. */
  sentenceOf(k, place) {
    if (k < 0) return "";
    if (!place) return "Add noise, and you see where this dot may have come from.";
    // as many equal ones have the same entropy
    const n = Math.round(Math.exp(this.weightsOf(k, place).reduce((sum, w) => sum - (w && w * Math.log(w)), 0)));
    const some = n > 0.9 * N ? "almost any" : `about ${n}`;
    return n > 1 ? `This dot may have come from ${some} of the ${N} clean dots. A thicker line means a likelier one, and the ring is their average.`
      : "Only one clean dot is left, and the arrow points there.";
  }

  /** Where a pointer is in the view, without its edge. */
  positionOf({ offsetX, offsetY }) {
    const view = viewOf(this.canvas, this.seen), ends = [0.92 * view.limit * view.wide, 0.92 * view.limit];
    return view.place(offsetX, offsetY).map((value, k) => Math.max(-ends[k], Math.min(ends[k], value)));
  }

  /** The point at a pointer, or -1. */
  pointNear(event, place) {
    const { index, distance } = nearest(...this.positionOf(event), this.at(place).x);
    return distance < 0.2 * this.limit ? index : -1;
  }
}

/** The scale of dots and lines, which are smaller in a small plane. */
const scaleOf = ({ height }) => Math.max(0.6, Math.min(1, height / 300));
export const pointOf = (x, k) => x.subarray(2 * k, 2 * k + 2);

/** Draw lines from a point to the data it may have come from, and a ring at their mean. */
function drawOrigins(plane, point, weights, shrunk) {
  const mean = [0, 0], largest = Math.max(...weights), small = scaleOf(plane);
  weights.forEach((weight, m) => {
    const origin = pointOf(shrunk, m);
    mean[0] += weight * origin[0];
    mean[1] += weight * origin[1];
    if (weight < 0.05 * largest) return;
    drawLine(plane, [point, origin], colours.lit, (0.4 + 4 * Math.sqrt(weight)) * small, 0.15 + 0.6 * weight);
    drawDots(plane, origin, (1.5 + 4 * Math.sqrt(weight)) * small, colours.lit, 0.8);
  });
  drawArrow(plane, point, mean, colours.ink, 2.5 * small, 9 * small);
  drawRing(plane, mean, 9 * small, colours.page, 5 * small);
  drawRing(plane, mean, 9 * small, colours.lit, 3 * small);
}
