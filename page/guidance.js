// Section 4: smileys from the same noise, with more and more guidance. They are recorded.

import { $, onTurn } from "./common.js";
import { drawImages, frame, partOf, pictureAt, rowOf } from "./plane.js";

const SHAPE = [3, 32, 32], NINE = 9;
const SETS = [0, 1, 2, 4]; // the guidance of each
const state = { at: 1, chosen: 6, guesses: [] }; // guesses: of the nine without the word, and with it

/** Show the two guesses about a picture, and what the guidance of set k makes of them. */
function choose(k, chosen = state.chosen) {
  Object.assign(state, { at: k, chosen: (chosen + NINE) % NINE });
  $("strip-place").value = k;
  for (const i of SETS.keys()) $(`strip-${i}`).closest("figure").classList.toggle("on", i === k);
  $("strip-place").ariaValueText = document.querySelector("#strip .on").innerText;
  $("strip-times").textContent = SETS[k];
  frame($("strip"), state.chosen, 3, 3);
  const [without, expected] = state.guesses.map((all) => partOf(all, state.chosen, NINE));
  const difference = expected.map((value, i) => value - without[i]);
  const guided = expected.map((value, i) => value + SETS[k] * difference[i]);
  Object.entries({ without, with: expected, difference, guided }).forEach(([key, shown]) => drawImages($(`strip-${key}`), shown, SHAPE));
}

/** Show the rows of smileys.webp, by docs/make_figures.py: the sets, and the two guesses in a step of the first one. */
export async function startGuidance() {
  const recording = $("strip-recording");
  await recording.decode();
  for (const k of SETS.keys()) {
    drawImages($(`strip-${k}`), rowOf(recording, k), SHAPE, 3, 1);
    $(`strip-${k}`).onclick = (event) => {
      choose(k, pictureAt(event, event.target, 3, 3));
      $("strip-place").focus({ preventScroll: true }); // for the keys
    };
  }
  state.guesses = [rowOf(recording, 4), rowOf(recording, 5)];
  $("strip-place").oninput = ({ target }) => choose(Number(target.value));
  onTurn($("strip-place"), (turn) => choose(state.at, state.chosen + turn));
  choose(state.at);
}
