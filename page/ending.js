// The end: emoji emerge from noise, a few at a time.

import { $, follow } from "./common.js";
import { included } from "./networks.js";
import { drawImages } from "./plane.js";
import { guided, noiseOf, sampleProgressive } from "./sampler.js";

const COUNT = 36, AT_ONCE = 6, STEPS = 10, SEED = 5;
const canvas = $("ending-grid");
let begun = false;

const columns = () => (innerWidth < 800 ? 6 : 12);

async function begin(shown) {
  const network = await included("emoji"), { size, shape, betas, classes } = network;
  for (let first = 0; first < COUNT; first += AT_ONCE) {
    const from = first * size, xT = shown.slice(from, from + AT_ONCE * size);
    const model = guided(network, Array.from({ length: AT_ONCE }, (_, k) => (first + k) % classes.length), 0);
    for await (const { x, x0, t } of sampleProgressive(model, null, betas, { sampler: "sa-solver", steps: STEPS, xT })) {
      shown.set(t < betas.length / STEPS ? x0 : x, from);
      drawImages(canvas, shown, shape, columns(), 2);
    }
  }
}

/** Begin when the end is seen: with noise, until the network is there. */
export function startEnding() {
  follow(canvas, (isSeen) => {
    if (!isSeen || begun) return;
    begun = true;
    const shown = noiseOf(SEED, COUNT, 3 * 32 * 32)();
    drawImages(canvas, shown, [3, 32, 32], columns(), 2);
    begin(shown).catch((error) => { $("ending-text").textContent = error.message.split("\n")[0]; });
  }, 0.2);
}
