// Section 1: dots dissolve into noise and come back along the exact arrows, in 50, 5 and 1 steps.

import { $, captions, onPointer, still } from "./common.js";
import { Passage } from "./passage.js";
import {
  clear, colours, drawArrow, drawArrows, drawDots, drawImages, drawLine, drawRing, grid,
} from "./plane.js";
import { DATA, STD, exactEps, meanOf, missed, nearest, posterior } from "./points.js";
import { ABAR, noiseOf, partsAt } from "./sampler.js";
import { Gesture } from "./timeline.js";

const N = DATA.length / 2, LIMIT = 1.5; // the end of the view, upwards
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
    const plane = clear(canvas, Math.max(LIMIT, up, Math.max(1.2, right) / wide));
    const small = Math.max(0.6, Math.min(1, plane.height / 300)); // the scale of what is drawn
    const shrunk = DATA.map((value) => value * signal);
    drawDots(plane, shrunk, 1.6 * small, colours.dim, 0.5);
    if (this.options.steps === 50 && steps && place) {
      const places = grid(plane, ROWS), eps = exactEps(places, signal ** 2, DATA, STD);
      const cell = (0.75 * plane.height) / ROWS;
      drawArrows(plane, places, eps.map((value) => -value), colours.arrow, cell, 1.4);
    }
    const parts = steps ? Array.from({ length: 41 }, (_, part) => part / 40) : []; // of the ways
    const way = parts.map((part) => this.at(from + (place - from) * part).x);
    const drawWay = (k, ...look) => drawLine(plane, way.map((it) => pointOf(it, k)), ...look);
    for (let k = 0; k < N; k += 9) drawWay(k, colourOf(DATA.labels[k]), 1.2 * small, 0.55);
    for (const [size, its] of [[10, 0.12], [3.2, 1]]) { // each point glows
      for (const label of [0, 1]) {
        const isOwn = (k) => DATA.labels[k] === label;
        drawDots(plane, x, size * small, colourOf(label), its * alpha, isOwn);
      }
    }
    this.plane = plane;
    if (chosen < 0) return;
    drawWay(chosen, colours.ink, 2.2 * small);
    const point = pointOf(x, chosen);
    if (place) drawOrigins(plane, point, this.weightsOf(chosen, place), shrunk, small);
    drawDots(plane, point, 6 * small, colours.page);
    drawDots(plane, point, 4.8 * small, colours.ink);
  }

  /** Put point k to a position of the view, by other noise. */
  pull(k, position, place) {
    const [signal, spread] = partsAt(this.levelAt(place)), { x0 } = this;
    const noise = this.noise.slice();
    for (const i of [0, 1]) noise[2 * k + i] = (position[i] - signal * x0[2 * k + i]) / spread;
    this.begin(x0, noise);
  }

  /** The probabilities of the origins of point k. */
  weightsOf(k, place) {
    const { x, level } = this.at(place), [signal] = partsAt(level);
    return posterior(...pointOf(x, k), signal ** 2, DATA, STD);
  }

  /** Where a pointer is in the plane, without the edge of the view. */
  positionOf({ offsetX, offsetY }) {
    const { width, height, place } = this.plane;
    const inside = (value, end) => Math.max(0.04 * end, Math.min(0.96 * end, value));
    return place(inside(offsetX, width), inside(offsetY, height));
  }

  /** The point at a pointer, or -1. */
  pointNear(event, place) {
    const { index, distance } = nearest(...this.positionOf(event), this.at(place).x);
    return distance < 0.2 * LIMIT ? index : -1;
  }
}

const pointOf = (x, k) => x.subarray(2 * k, 2 * k + 2);

/** Draw lines from a point to the data it may have come from, and a ring at their mean. */
function drawOrigins(plane, point, weights, shrunk, small) {
  const mean = meanOf(shrunk, weights), largest = Math.max(...weights);
  weights.forEach((weight, m) => {
    const origin = pointOf(shrunk, m), size = Math.sqrt(weight);
    if (weight < 0.05 * largest) return;
    drawLine(plane, [point, origin], colours.lit, (0.4 + 4 * size) * small, 0.15 + 0.6 * weight);
    drawDots(plane, origin, (1.5 + 4 * size) * small, colours.lit, 0.8);
  });
  drawArrow(plane, point, mean, colours.ink, 2.5 * small, 9 * small);
  drawRing(plane, mean, 9 * small, colours.page, 5 * small);
  drawRing(plane, mean, 9 * small, colours.lit, 3 * small);
}

function draw() {
  const { place, isBack } = gesture;
  large.draw(place, isBack ? 0.9 : 0.35, chosen); // the one dot is seen among the others
  for (const scene of scenes.slice(1)) scene.draw(place);
  drawImages($("arrows-tile"), pointOf(large.at(place).x, chosen), [1, 1, 2]);
}

function say() {
  const { place, isBack, hasCome } = gesture;
  const shares = scenes.map((scene) => hasCome && missed(scene.result, DATA));
  for (const [k, { canvas }] of scenes.entries()) {
    const percent = (100 * shares[k]).toFixed(0);
    $(`${canvas.id}-miss`).textContent = hasCome ? `${percent}% miss` : "";
  }
  if (hasCome) return show(shares[2] < 0.1 ? "near" : "done");
  if (!place) return show("clean");
  const weights = large.weightsOf(chosen, place);
  // as many equally likely origins have the same entropy
  const n = Math.round(Math.exp(weights.reduce((sum, w) => sum - (w && w * Math.log(w)), 0)));
  return show(n > 1 ? "many" : "one", { some: n > 0.9 * N ? "almost any" : `about ${n}` });
}

/** Let the pointer choose a dot, and pull it. */
function listen() {
  let before = null, start; // the dot before, or null where the pointer has none
  onPointer(large.canvas, {
    press(event) {
      const near = large.pointNear(event, gesture.place);
      [before, start] = [near < 0 ? null : chosen, event.offsetX];
      if (near >= 0) chosen = near;
      gesture.render();
    },
    drag(event) {
      const scrolls = event.pointerType === "touch" && Math.abs(event.offsetX - start) < 8;
      if (before === null || scrolls) return;
      start = NaN; // it drags from now on
      gesture.stop();
      if (gesture.place < 0.2) gesture.moveTo(FIRST); // so little noise moves no dot
      for (const scene of scenes) scene.pull(chosen, large.positionOf(event), gesture.place);
      gesture.render();
    },
    release() {
      const isReady = before !== null && gesture.place && !gesture.isBack;
      if (isReady) gesture.hold(HOLD.next, () => gesture.sendBack());
    },
    cancel() {
      chosen = before ?? chosen;
      gesture.render();
    },
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
