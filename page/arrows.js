// Section 1: the same dots come back in 50 steps, in a large plane with arrows, and in 5 and 1.

import { $, captions, onPointer, still } from "./common.js";
import { drawImages } from "./plane.js";
import { STD, missed } from "./points.js";
import { DATA, N, Scene, pointOf } from "./scene.js";
import { Gesture } from "./timeline.js";

const FIRST = 0.45; // where it begins
const HOLD = { first: 6000, next: 1200 }; // the milliseconds for which a dot stays
const show = captions("arrows");
let chosen = 64; // the dot whose origins are shown: at first, one that is below the others
let gesture, scenes, large;

function draw() {
  const { place, isBack } = gesture;
  large.draw(place, isBack ? 0.9 : 0.35, chosen); // the one dot is seen among the others
  for (const scene of scenes.slice(1)) scene.draw(place);
  drawImages($("arrows-tile"), pointOf(large.at(place).x, chosen), [1, 1, 2]);
}

function say() {
  const { place, isBack, hasCome } = gesture;
  const shares = scenes.map((scene) => hasCome && missed(scene.result, DATA, STD));
  for (const [k, { canvas }] of scenes.entries()) {
    const percent = (100 * shares[k]).toFixed(0);
    $(`${canvas.id}-miss`).textContent = hasCome ? `${percent}% miss` : "";
  }
  if (hasCome) return show(shares[2] < 0.4 ? "near" : "done");
  if (!place) return show("clean");
  const title = isBack ? "On the way back" : "One dot: drag it";
  const weights = large.weightsOf(chosen, place);
  // as many equally likely origins have the same entropy
  const n = Math.round(Math.exp(weights.reduce((sum, w) => sum - (w && w * Math.log(w)), 0)));
  return show(n > 1 ? "many" : "one", { title, some: n > 0.9 * N ? "almost any" : `about ${n}` });
}

function choose(k) {
  chosen = k;
  gesture.render();
}

/** Let the pointer choose a dot, and pull it. */
function listen() {
  let before = null; // the dot before, or null where the pointer has none
  onPointer(large.canvas, {
    press(event) {
      const near = large.pointNear(event, gesture.place);
      before = near < 0 ? null : chosen;
      if (near >= 0) choose(near);
    },
    drag(event) {
      if (before === null) return;
      gesture.stop();
      if (gesture.place < 0.2) gesture.moveTo(FIRST); // so little noise moves no dot
      for (const scene of scenes) scene.pull(chosen, large.positionOf(event), gesture.place);
      gesture.render();
    },
    release() {
      const isReady = before !== null && gesture.place && !gesture.isBack;
      if (isReady) gesture.hold(HOLD.next, () => gesture.sendBack());
    },
    cancel: () => before !== null && choose(before),
  });
}

/** Make the section work. Returns its timeline. */
export function startArrows() {
  const changed = () => gesture.render();
  scenes = [50, 5, 1].map((steps) => new Scene($(`arrows-${steps}`), steps, 1.5, changed));
  [large] = scenes;
  gesture = new Gesture("arrows", scenes, draw, say);
  listen();
  gesture.moveTo(FIRST);
  if (!still) gesture.whenSeen(() => gesture.hold(HOLD.first, () => gesture.sendBack()));
  return gesture;
}
