// Section 1: the same dots come back in 50 steps, in a large plane with arrows, and in 5 and 1. In the last
// part, two rules for a step.

import { $, announce } from "./common.js";
import { Gesture } from "./gesture.js";
import { STD, missed } from "./points.js";
import { drawImages } from "./plane.js";
import { DATA, N, Scene, pointOf } from "./scene.js";

const FIRST = 0.45, HOLD = 4000; // where it begins, and the milliseconds for which it stays there
const RELEASED = 1200; // milliseconds for which a dot stays where the reader has put it
const CHOSEN = 64; // a point that is below the others
const state = { chosen: CHOSEN, pinned: CHOSEN };
export let gesture, pair;

/** A scene in a canvas, which makes `gesture()` show its news. */
const sceneIn = (name, sampler, steps, gesture, options) => new Scene($(`arrows-${name}`),
  { limit: 1.75, sampler, steps, keepsData: true, ...options }, () => gesture().render());

function say() {
  const { place, isBack, passages } = gesture, [large, , one] = passages;
  for (const scene of passages) {
    const isThere = isBack && !place && scene.isComplete;
    $(`${scene.canvas.id}-miss`).textContent = isThere ? `${(100 * missed(scene.at(0).x, DATA, STD)).toFixed(0)}% miss the arcs` : "";
  }
  const [title, text] = isBack && !place ? ["Back from the noise", missed(one.at(0).x, DATA, STD) < 0.4 ? "After so little noise, one step is almost enough. Begin with more noise to see the difference."
    : "One step ends between the arcs. Many short steps reach an arc, perhaps the other one: a dot keeps its colour."]
    : [isBack ? "On the way back" : "One dot: drag it", large.sentenceOf(state.chosen, place) || "Drag the slider to Noise, and let go."];
  [$("arrows-title").textContent, $("arrows-text").textContent] = [title, text];
  return `${title}. ${text}`;
}

/** Let a pointer and the arrow keys choose a dot. pull(position) drags it, and release(ms) lets it go after some
 * milliseconds. */
function letChoose(scene, pull, release) {
  const { canvas } = scene;
  let pulls = false, pulled = false, finger = null; // where a finger that may scroll went down
  const choose = (k) => {
    state.chosen = state.pinned = k;
    gesture.render();
  };
  const take = (event) => {
    const near = scene.pointNear(event, gesture.place);
    if (near < 0) return;
    choose(near);
    canvas.setPointerCapture(event.pointerId);
    pulls = true;
  };
  canvas.onpointerdown = (event) => {
    finger = event.pointerType === "touch" ? event.clientX : null;
    if (finger === null) take(event);
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    if (finger !== null && event.type === "pointerup") take(event); // a tap
    if (pulls && gesture.place && !gesture.isBack) release(pulled ? RELEASED : HOLD);
    pulls = pulled = false;
    finger = null;
  };
  canvas.onpointermove = (event) => {
    if (finger !== null && Math.abs(event.clientX - finger) > 8) {
      finger = null;
      take(event);
    }
    pulled ||= pulls;
    if (pulls) return pull(scene.positionOf(event));
    if (event.pointerType !== "mouse") return;
    const near = scene.pointNear(event, gesture.place);
    state.chosen = near < 0 ? state.pinned : near;
    gesture.render();
  };
  canvas.onpointerleave = () => {
    state.chosen = state.pinned;
    gesture.render();
  };
  canvas.onkeydown = (event) => {
    const turn = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Escape: 0 }[event.key];
    if (turn === undefined) return;
    event.preventDefault();
    gesture.stop(); // it would go on by itself
    choose(turn ? (Math.max(state.pinned, turn < 0 ? 0 : -1) + turn + N) % N : -1);
    announce(turn ? `Dot ${state.pinned + 1} of ${N}. ${say()}` : "No dot is chosen.");
  };
}

/** Make the section work, and the two planes of the last part. */
export function startArrows() {
  const scenes = [50, 5, 1].map((steps) => sceneIn(steps, "ddim", steps, () => gesture, { limit: 1.5, every: 9, arrows: steps === 50 }));
  const [large, ...small] = scenes, pull = (position) => {
    gesture.stop();
    if (gesture.place < 0.2) gesture.moveTo(FIRST); // so little noise moves no dot
    for (const scene of scenes) scene.pull(state.pinned, position, gesture.place);
    gesture.render();
  };
  gesture = new Gesture("arrows", scenes, () => {
    large.alpha = gesture.isBack ? 0.9 : 0.35; // the one dot is seen among the others
    large.draw(gesture.place, state.chosen);
    for (const scene of small) scene.draw(gesture.place);
    if (state.chosen >= 0) drawImages($("arrows-tile"), pointOf(large.at(gesture.place).x, state.chosen), [1, 1, 2]);
  }, say);
  letChoose(large, pull, (ms) => {
    gesture.sendBack();
    gesture.hold = ms;
  });
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
