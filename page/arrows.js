// Section 1: dots dissolve into noise and come back along the exact arrows, in 50, 5 and 1 steps.

import { $, captions, onPointer, still } from "./common.js";
import { Passage } from "./passage.js";
import * as plane from "./plane.js";
import { DATA, STD, exactEps, missed, nearest, posterior } from "./points.js";
import { ABAR, noiseOf, partsAt } from "./sampler.js";
import { Gesture } from "./timeline.js";

const { colours } = plane, N = DATA.length / 2, LIMIT = 1.5; // the end of the view, upwards
const ROWS = 13; // of arrows
const colourOf = (label) => (label ? colours.data : colours.other); // of its origin
const FIRST = 0.45; // where it begins
const HOLD = { first: 6000, next: 1200 }; // the milliseconds for which a dot stays
const show = captions("arrows");
let chosen = 64; // the dot whose origins are shown: at first, one that is below the others
let gesture, scenes, large;

class Scene extends Passage {
  constructor(canvas, steps) {
    const options = { steps, clip: false, keepsData: true };
    super((x, t) => exactEps(x, ABAR[t], DATA, STD), options);
    this.canvas = canvas;
    this.begin(DATA, noiseOf(1, 1, 2 * N));
  }

  /** alpha: of the dots. chosen: the point whose origins are shown, or -1. */
  draw(place, alpha = 0.9, chosen = -1) {
    const { x, level } = this.at(place), [signal, spread] = partsAt(level);
    const { canvas, steps, from } = this, wide = canvas.clientWidth / canvas.clientHeight;
    const [right, up] = chosen < 0 ? [0, 0] : pointOf(x, chosen).map((it) => 1.08 * Math.abs(it));
    // the data and the chosen point are always in the view
    const view = plane.clear(canvas, Math.max(LIMIT, up, Math.max(1.2, right) / wide));
    const small = Math.max(0.6, Math.min(1, view.height / 300)); // the scale of what is drawn
    const shrunk = DATA.map((value) => value * signal);
    plane.drawDots(view, shrunk, 1.6 * small, colours.dim, 0.5);
    if (this.options.steps === 50 && steps && place) {
      const places = plane.grid(view, ROWS), eps = exactEps(places, signal ** 2, DATA, STD);
      const cell = (0.75 * view.height) / ROWS;
      plane.drawArrows(view, places, eps.map((value) => -value), colours.arrow, cell, 1.4);
    }
    const parts = steps ? Array.from({ length: 41 }, (_, part) => part / 40) : []; // of the ways
    const way = parts.map((part) => this.at(from + (place - from) * part).x);
    const drawWay = (k, ...look) => plane.drawLine(view, way.map((it) => pointOf(it, k)), ...look);
    for (let k = 0; k < N; k += 9) drawWay(k, colourOf(DATA.labels[k]), 1.2 * small, 0.55);
    for (const [size, its] of [[10, 0.12], [3.2, 1]]) { // each point glows
      for (const label of [0, 1]) {
        const isOwn = (k) => DATA.labels[k] === label;
        plane.drawDots(view, x, size * small, colourOf(label), its * alpha, isOwn);
      }
    }
    this.view = view;
    if (chosen < 0) return;
    drawWay(chosen, colours.ink, 2.2 * small);
    const point = pointOf(x, chosen);
    if (place) drawOrigins(view, point, originsOf(chosen, x, level), shrunk, small);
    plane.drawDots(view, point, 6 * small, colours.page);
    plane.drawDots(view, point, 4.8 * small, colours.ink);
  }

  /** Put point k to a position of the view, by other noise. */
  pull(k, position, place) {
    const [signal, spread] = partsAt(this.levelAt(place)), { x0 } = this;
    const noise = this.noise.slice();
    for (const i of [0, 1]) noise[2 * k + i] = (position[i] - signal * x0[2 * k + i]) / spread;
    this.begin(x0, noise);
  }

  /** Where a pointer is in the plane, without the edge of the view. */
  positionOf({ offsetX, offsetY }) {
    const { width, height, place } = this.view;
    const inside = (value, end) => Math.max(0.04 * end, Math.min(0.96 * end, value));
    return place(inside(offsetX, width), inside(offsetY, height));
  }
}

const pointOf = (x, k) => x.subarray(2 * k, 2 * k + 2);
/** The probabilities of the origins of point k. */
const originsOf = (k, x, level) => posterior(...pointOf(x, k), partsAt(level)[0] ** 2, DATA, STD);

/** Draw lines from a point to the data it may have come from, and a ring at their mean. */
function drawOrigins(view, point, weights, shrunk, small) {
  const meanOf = (i) => weights.reduce((sum, weight, m) => sum + weight * shrunk[2 * m + i], 0);
  const mean = [meanOf(0), meanOf(1)], largest = Math.max(...weights);
  weights.forEach((weight, m) => {
    const origin = pointOf(shrunk, m), size = Math.sqrt(weight) * small;
    if (weight < 0.05 * largest) return;
    plane.drawLine(view, [point, origin], colours.lit, small / 2 + 4 * size, 0.15 + 0.6 * weight);
    plane.drawDots(view, origin, 1.5 * small + 4 * size, colours.lit, 0.8);
  });
  plane.drawArrow(view, point, mean, colours.ink, 2.5 * small, 9 * small);
  plane.drawRing(view, mean, 9 * small, colours.page, 5 * small);
  plane.drawRing(view, mean, 9 * small, colours.lit, 3 * small);
}

function draw() {
  const { place, isBack } = gesture;
  large.draw(place, isBack ? 0.9 : 0.35, chosen); // the one dot is seen among the others
  for (const scene of scenes.slice(1)) scene.draw(place);
  plane.drawImages($("arrows-tile"), pointOf(large.at(place).x, chosen), [1, 1, 2]);
}

function say() {
  const { place, isBack, hasCome } = gesture;
  for (const { canvas, result } of scenes) {
    $(`${canvas.id}-miss`).textContent = hasCome ? `${missed(result, DATA)}% miss` : "";
  }
  if (hasCome) return show("done");
  if (!place) return show("clean");
  const { x, level } = large.at(place), weights = originsOf(chosen, x, level);
  // as many equally likely origins have the same entropy
  const n = Math.round(Math.exp(weights.reduce((sum, w) => sum - (w && w * Math.log(w)), 0)));
  const some = n > 0.9 * N ? "almost any" : n > 1 ? `about ${n}` : "only one";
  return show("noising", { some });
}

/** Let the pointer choose a dot, and pull it. */
function listen() {
  let holds = false, start; // holds: whether the pointer has a dot
  onPointer(large.canvas, {
    press(event) {
      const { x } = large.at(gesture.place), near = nearest(...large.positionOf(event), x);
      [holds, start] = [near.distance < 0.2 * LIMIT, event.offsetX];
      if (holds) chosen = near.index;
      gesture.render();
    },
    drag(event) {
      const scrolls = event.pointerType === "touch" && Math.abs(event.offsetX - start) < 8;
      if (!holds || scrolls) return;
      start = NaN; // it drags from now on
      gesture.stop();
      if (gesture.place < 0.2) gesture.moveTo(FIRST); // so little noise moves no dot
      for (const scene of scenes) scene.pull(chosen, large.positionOf(event), gesture.place);
      gesture.render();
    },
    release() {
      const isReady = holds && gesture.place && !gesture.isBack;
      if (isReady) gesture.hold(HOLD.next, () => gesture.sendBack());
    },
    cancel() {}, // the page scrolls
  });
}

/** Make the section work. Returns its timeline. */
export function startArrows() {
  scenes = [50, 5, 1].map((steps) => new Scene($(`arrows-${steps}`), steps));
  [large] = scenes;
  gesture = new Gesture("arrows", scenes, draw, say);
  listen();
  gesture.moveTo(FIRST);
  if (!still) gesture.hold(HOLD.first, () => gesture.sendBack(), 0.7);
  return gesture;
}
