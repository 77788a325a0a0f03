// Section 1: dots dissolve into noise and come back along the exact arrows, in 50, 5 and 1 steps.

import { $, captions, onPointer, still } from "./common.js";
import { Passage } from "./passage.js";
import * as plane from "./plane.js";
import { DATA, exactEps, meanOf, missed, nearest, posterior } from "./points.js";
import { ABAR, noiseOf, partsAt } from "./sampler.js";
import { Gesture } from "./timeline.js";

const { colours } = plane, N = DATA.length / 2, LIMIT = 1.5; // the end of the view, upwards
const ROWS = 13, FIRST = 0.45; // of arrows; where it begins
const HOLD = { first: 8000, next: 4000 }; // the milliseconds for which a dot stays
const show = captions("arrows");
const pointOf = (x, k) => x.subarray(2 * k, 2 * k + 2);
const colourOf = (k) => (k < N / 2 ? colours.data : colours.other); // of its arc
const numbers = Array.from({ length: N }, (_, k) => k);
let chosen = 64; // the dot whose origins are shown: at first, one that is below the others
let gesture, scenes, large;

/** All dots in one of the three panels. */
class Scene extends Passage {
  constructor(canvas, steps) {
    super((x, t) => exactEps(x, ABAR[t], DATA), { steps, clip: false, keepsData: true });
    this.canvas = canvas;
    this.begin(DATA, noiseOf(1, 1, 2 * N));
  }

  /** Draw the dots at a place. alpha: of the dots. follows: whether the chosen one is marked. */
  draw(place, alpha, follows) {
    const { x, level } = this.at(place), { canvas } = this, point = pointOf(x, chosen);
    const [right, up] = follows ? point.map(Math.abs) : [0, 0]; // it is always in the view
    const far = Math.max(up, (right * canvas.clientHeight) / canvas.clientWidth);
    this.view = plane.clear(canvas, Math.max(LIMIT, 1.08 * far));
    this.small = Math.max(0.6, Math.min(1, this.view.height / 300)); // the scale of what is drawn
    const [signal] = partsAt(level), shrunk = DATA.map((value) => signal * value);
    plane.drawDots(this.view, shrunk, 1.6 * this.small, colours.dim, 0.5);
    if (follows && this.steps && place) {
      const places = plane.grid(this.view, ROWS), eps = exactEps(places, signal ** 2, DATA);
      plane.drawField(this.view, places, eps, colours.arrow, 1.4);
    }
    if (this.steps) this.drawWays(place, follows);
    this.drawPoints(x, alpha, follows);
    if (follows && place) this.drawOrigins(point, signal, shrunk);
    if (follows) plane.drawDots(this.view, point, 6 * this.small, colours.page);
    if (follows) plane.drawDots(this.view, point, 4.8 * this.small, colours.ink);
  }

  /** Draw the ways back of some points until a place. */
  drawWays(place, follows) {
    const { view, small, from } = this;
    const places = numbers.slice(0, 40).map((k) => from * (1 - k / 40)).filter((its) => its > place);
    const states = [...places, place].map((its) => this.at(its));
    const wayOf = (k) => states.map(({ x }) => pointOf(x, k));
    for (const colour of [colours.other, colours.data]) {
      const own = numbers.filter((k) => k % 9 === 0 && colourOf(k) === colour);
      plane.drawLines(view, own.map(wayOf), colour, 1.2 * small, 0.55);
    }
    if (follows) plane.drawLines(view, [wayOf(chosen)], colours.ink, 2.2 * small);
  }

  /** Draw the points in the colours of their arcs. In the large panel, each one glows. */
  drawPoints(x, alpha, glows) {
    for (const colour of [colours.other, colours.data]) {
      const own = numbers.filter((k) => colourOf(k) === colour).flatMap((k) => [...pointOf(x, k)]);
      if (glows) plane.drawDots(this.view, own, 10 * this.small, colour, 0.12 * alpha);
      plane.drawDots(this.view, own, 3.2 * this.small, colour, alpha);
    }
  }

  /** Draw lines from a point to the data it may have come from, and a ring at their mean. */
  drawOrigins(point, signal, shrunk) {
    const { view, small } = this, weights = posterior(point, signal ** 2, DATA);
    const mean = meanOf(weights, shrunk);
    plane.drawOrigins(view, point, shrunk, weights, small);
    plane.drawArrow(view, point, mean, colours.ink, 2.5 * small, { gap: 9 * small });
    plane.drawRing(view, mean, 9 * small, colours.page, 5 * small);
    plane.drawRing(view, mean, 9 * small, colours.lit, 3 * small);
  }
}

function draw() {
  const { place, isBack } = gesture;
  large.draw(place, isBack ? 0.9 : 0.35, true); // the one dot is seen among the others
  for (const scene of scenes.slice(1)) scene.draw(place, 0.9, false);
  plane.drawImages($("arrows-tile"), pointOf(large.at(place).x, chosen), [1, 1, 2]);
}

function say() {
  const { place, hasCome } = gesture;
  for (const { canvas, result } of scenes) {
    $(`${canvas.id}-miss`).textContent = hasCome ? `${missed(result, DATA)}% miss` : "";
  }
  if (hasCome) return show(missed(scenes[2].result, DATA) < 30 ? "little" : "done");
  return show(place > 0.9 ? "noise" : place ? "noising" : "clean");
}

/** Make the section work. Returns its timeline. */
export function startArrows() {
  scenes = [50, 5, 1].map((steps) => new Scene($(`arrows-${steps}`), steps));
  [large] = scenes;
  gesture = new Gesture("arrows", scenes, { draw, say });
  const goOn = () => gesture.place && gesture.hold(HOLD.next, () => gesture.sendBack());
  const point = (event) => {
    chosen = nearest(...large.view.place(event), large.at(gesture.place).x).index;
    gesture.stop();
  };
  onPointer(large.canvas, { press: point, drag: point, release: goOn });
  gesture.moveTo(FIRST);
  if (!still) gesture.hold(HOLD.first, () => gesture.sendBack(), 0.7);
  return gesture;
}
