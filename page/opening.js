// The opening: pictures dissolve into noise, and the network of the emoji draws new ones.

import { $, still } from "./common.js";
import { Gesture } from "./gesture.js";
import { included } from "./networks.js";
import { Passage } from "./passage.js";
import { drawImages, rowOf } from "./plane.js";
import { guided, noiseOf, partsAt } from "./sampler.js";

const COUNT = 12, SHAPE = [3, 32, 32], SIZE = 3072, STEPS = 10, GUIDANCE = 1;
const columns = () => (innerWidth < 736 ? 4 : 6);
let fault = ""; // of the network
/** Which kind the pictures are of: of the next one, if they come back from only noise. */
const turnOf = ({ x0, from }) => (x0.turn ?? 0) + Number(from === 1);
export let gesture;
export const pictures = new Passage(eps, { sampler: "ddim", steps: STEPS, scales: true }, (error) => {
  if (error) fault = error.message.split("\n")[0];
  else pictures.steps.at(-1).x0.turn = turnOf(pictures); // noise may be added to these
  gesture.render();
});

/** The first way back is recorded, because the network may still be loading: recorded.webp, by docs/make_figures.py,
 * has the first pictures, and then a row of estimates for each step. */
async function eps(x, t) {
  if (gesture.round === 1 && pictures.from === 1) {
    const [signal, spread] = partsAt(t), x0 = rowOf($("scene-recording"), 1 + Math.floor(((999 - t) * STEPS) / 1000));
    return x.map((value, k) => (value - signal * x0[k]) / spread);
  }
  const network = await included("emoji"), { kinds } = network, turn = turnOf(pictures);
  return guided(network, Array.from({ length: COUNT }, (_, k) => kinds[(k + Math.floor(k / 6) + turn) % kinds.length]), GUIDANCE)(x, t);
}

/** The heading below the pictures, and what to see. */
function captions() {
  const { place, isBack } = gesture, { from, jumps, steps } = pictures;
  if (fault) return ["No network", fault];
  if (!isBack && !place) return ["Clean", "A network has drawn these twelve smileys, people and flags."];
  if (!isBack && place < 1) return ["Noise is added", "The pictures disappear in the noise."];
  if (!isBack) return ["Only noise is left", "Nobody can tell what was here. Let go, and the way back begins."];
  if (jumps) return ["Back in one jump", steps.length ? "One jump ends at a blur of all smileys, of all people, or of all flags." : "The network begins."];
  if (place) return ["Back in many steps", steps.length ? "In each step, the network removes a little of the noise." : "The network begins."];
  return from > 0.9 ? ["New pictures", "No person drew them."]
    : [from > 0.5 ? "Similar pictures" : "The same pictures", "From more noise, other ones come back."];
}

function say() {
  const [title, text] = captions();
  [$("scene-title").textContent, $("scene-text").textContent] = [title, text];
  $("scene-many").textContent = gesture.moving ? "Pause" : gesture.paused ? "Continue" : gesture.place ? "Back in many steps" : "Play";
  return `${title}. ${text}`;
}

/** Send everything back for the reader, or stop. A jump begins with only noise. */
function press(jumps) {
  const { moving, paused, isBack, place } = gesture;
  if (!jumps && (moving || paused)) return gesture.pause();
  if (jumps && moving && (gesture.jumps || pictures.jumps)) return; // it jumps
  gesture.stop();
  gesture.stage.scrollIntoView({ block: "nearest" }); // only what is in sight moves
  if (jumps && isBack && place && pictures.from === 1) gesture.place = 1;
  if (jumps && gesture.place < 1) return gesture.toNoise(true);
  gesture.sendBack(jumps);
}

/** Make the opening work, which begins with the recording. */
export async function startOpening() {
  await $("scene-recording").decode();
  pictures.begin(rowOf($("scene-recording"), 0), noiseOf(0, COUNT, SIZE)());
  gesture = new Gesture("scene", [pictures], () => drawImages($("scene-pictures"), pictures.at(gesture.place).x, SHAPE, columns(), 1), say);
  $("scene-many").onclick = () => press(false);
  $("scene-one").onclick = () => press(true);
  Object.assign(gesture, { moving: !still, repeats: !still });
  gesture.render();
}
