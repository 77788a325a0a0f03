// Section 1: what the arrows are. The same points come back in 1, 5 and 50 steps, by two samplers.

import { $, still } from "./common.js";
import { Gesture } from "./gesture.js";
import { STD, missed } from "./points.js";
import { DATA, Scene, letChoose } from "./scene.js";

const PLANES = [["ddim", 1], ["ddim", 5], ["ddim", 50], ["ddpm", 5], ["ddpm", 50]];
const state = { chosen: 88, pinned: 88 }; // point 88 is above the others
export let gesture;

function say() {
  const { place, isBack, moving, passages: scenes } = gesture;
  for (const scene of scenes) {
    const isThere = isBack && !place && scene.isComplete, name = scene.canvas.id.replace("plane", "miss");
    $(name).textContent = isThere ? `${(100 * missed(scene.at(0).x, DATA, STD)).toFixed(0)} % miss the data` : "";
  }
  const text = isBack && !place ? "The shorter the steps, the more points end at the data: a point misses if no data point is near."
    : isBack ? "The points follow their arrows."
    : moving ? "Noise is added."
    : scenes[2].sentenceOf(state.chosen, place) || "Drag the slider to the noise, and let go. Touch a point to see its path and its origins.";
  return ($("arrows-text").textContent = text);
}

/** Make the section work. */
export function startArrows() {
  const scenes = PLANES.map(([sampler, steps]) => new Scene($(`arrows-plane-${sampler}-${steps}`),
    { limit: 1.75, every: sampler === "ddim" ? 11 : 31, sampler, steps, keepsData: true }, () => gesture.render()));
  gesture = new Gesture("arrows", scenes, () => scenes.forEach((scene) => scene.draw(gesture.place, state.chosen)), say);
  for (const scene of scenes) letChoose(scene, state, () => gesture);
  gesture.moveTo(still ? 0.6 : 0);
  gesture.beginWhenSeen();
}
