// Section 1: what the arrows are, with one point in a large plane; then the same points come back in 1, 5
// and 50 steps. In the last part, two rules for a step.

import { $ } from "./common.js";
import { Gesture } from "./gesture.js";
import { STD, missed } from "./points.js";
import { drawImages } from "./plane.js";
import { DATA, Scene, letChoose, pointOf } from "./scene.js";

const FIRST = 0.45, HOLD = 6000; // where it begins, and the milliseconds for which it stays there
const CHOSEN = 64; // a point that is below the others
const state = { chosen: CHOSEN, pinned: CHOSEN };
export let gesture, pair;

/** A scene in a canvas, which makes `gesture()` show its news. */
const sceneIn = (name, sampler, steps, gesture, options) => new Scene($(`arrows-${name}`),
  { limit: 1.75, sampler, steps, keepsData: true, ...options }, () => gesture().render());

function say() {
  const { place, isBack, passages: [one, ...row] } = gesture;
  for (const scene of row) {
    const isThere = isBack && !place && scene.isComplete;
    $(`${scene.canvas.id}-miss`).textContent = isThere ? `${(100 * missed(scene.at(0).x, DATA, STD)).toFixed(0)}% miss the arcs` : "";
  }
  const [title, text] = isBack && !place ? ["Back from the noise", missed(row[0].at(0).x, DATA, STD) < 0.1 ? "After so little noise, one step is enough. Begin with more noise to see the difference."
    : "One step ends at the average, which lies between the arcs. Many short steps reach them."]
    : [isBack ? "On the way back" : "One dot: drag it", one.sentenceOf(state.chosen, place) || "Drag the slider to Noise, and let go."];
  [$("arrows-title").textContent, $("arrows-text").textContent] = [title, text];
  return `${title}. ${text}`;
}

/** Make the section work, and the two planes of the last part. */
export function startArrows() {
  const one = sceneIn("one", "ddim", 50, () => gesture, { alpha: 0.35, limit: 1.4 });
  const row = [1, 5, 50].map((steps) => sceneIn(`in-${steps}`, "ddim", steps, () => gesture, { every: 11 }));
  const scenes = [one, ...row], pull = (position) => {
    gesture.stop();
    if (gesture.place < 0.2) gesture.moveTo(FIRST); // so little noise moves no dot
    for (const scene of scenes) scene.pull(state.pinned, position, gesture.place);
    gesture.render();
  };
  gesture = new Gesture("arrows", scenes, () => {
    one.draw(gesture.place, state.chosen);
    for (const scene of row) scene.draw(gesture.place);
    if (state.chosen >= 0) drawImages($("arrows-tile"), pointOf(one.at(gesture.place).x, state.chosen), [1, 1, 2]);
  }, say);
  letChoose(one, state, () => gesture, pull);
  gesture.moveTo(FIRST);
  gesture.beginWhenSeen(() => {
    gesture.hold = HOLD;
    gesture.moving = true;
    gesture.render();
  });

  const both = [sceneIn("ddim", "ddim", 50, () => pair, { every: 40 }), sceneIn("ddpm", "ddpm", 50, () => pair, { every: 80 })];
  pair = new Gesture("pair", both, () => both.forEach((scene) => scene.draw(pair.place, CHOSEN)), () => "");
  pair.beginWhenSeen();
}
