// Section 3: images. Samples of the network, step by step.

import { $, announce, bind, follow, still } from "./common.js";
import { drawImages, toPixels } from "./plane.js";
import { modelOf, network, reverse, tell, work } from "./reverse.js";
import { noiseOf } from "./sampler.js";

const QUICK = 50, NOTHING = { steps: 0, frames: [] }; // QUICK: up to so many steps, a changed control draws again

const state = { steps: 10, sampler: "sa-solver", count: innerWidth < 800 ? 4 : 16, seed: 0, class: "all", w: 0, step: 0 };
// What is shown: {name, of, count, shape, steps, frames}, of the same noise and kind if `of` is the same, with pixels in {t, x, x0}; t = -1 is the result.
let run = NOTHING, before = NOTHING; // the last one, and the complete one before it
let isNew = false; // whether a control has changed since the last images
let mayBegin = !still; // whether the first images are drawn as soon as they are seen
let show; // the state in the controls

function draw() {
  mayBegin = isNew = false;
  const { count, seed, sampler, w } = state, { betas, variance, size, shape } = network;
  const steps = Math.min(state.steps, betas.length);
  const kind = network.classes.length && $("image-class").selectedOptions[0].text, how = w && `guidance ${w}`;
  const solver = sampler !== "sa-solver" && $("image-sampler").selectedOptions[0].text;
  const words = [`${steps} step${steps > 1 ? "s" : ""}`, solver, kind, how];
  const own = { name: words.filter(Boolean).join(", "), of: `${seed} ${state.class} ${count}`, count, shape, steps, frames: [] };
  const drawNoise = noiseOf(seed, count, size), model = modelOf(state.class, count, w);
  reverse("status", `${count} images`, model, drawNoise, betas, { sampler, steps, variance }, ({ t, x, x0 }, isLast) => {
    if (run !== own && run.frames.at(-1)?.t < 0) before = run;
    run = own; // only now: the run before may still be at work
    own.frames.push({ t, x: toPixels(x), x0: toPixels(x0) });
    if (isLast) own.frames.push({ t: -1, x: toPixels(x0), x0: toPixels(x0) });
    state.step = own.frames.length - 1;
    render();
  });
}

/** Show the state in the controls, the images and the words. */
function render() {
  const { name, count, shape, steps, frames } = run, frame = frames[state.step];
  $("image-step").max = work.busy ? steps : Math.max(0, frames.length - 1); // before the value, which it limits
  show();
  if (!work.busy && document.activeElement === $("stop")) $("sample").focus(); // before it is disabled
  $("stop").disabled = !work.busy;
  $("sample").disabled = !network;
  $("image-step").disabled = work.busy || !frame;
  $("image-w-value").textContent = state.w;
  $("image-w").disabled = state.class === String(network?.classes.length); // without a kind, it changes nothing
  $("image-shown").textContent = name;
  if (!frame) return;
  const { t, x, x0 } = frame, columns = Math.sqrt(count);
  drawImages($("noise"), x, shape, columns);
  drawImages($("grid"), x0, shape, columns);
  $("image-at").textContent = t < 0 ? "the result" : `level ${t}`;
  $("comparison").hidden = before.of !== run.of;
  if (before.of !== run.of) return;
  drawImages($("before"), before.frames.at(-1).x0, shape, Math.sqrt(before.count));
  $("image-before").textContent = before.name;
}

async function changed(key) {
  if (key === "step") return render();
  [mayBegin, isNew] = [false, true];
  render();
  if (!run.frames.length && !work.busy) return;
  if (state.steps <= QUICK) return draw();
  const said = work.busy ? "Stopped. " : "";
  await work.stop();
  tell(["status"], `${said}Press Draw to see this change. ${state.steps} steps take a while.`);
}

/** Another network: offer its classes, and forget the images of the one before. */
export function beginImages({ classes }) {
  const all = new Option("all in turn", "all"), any = new Option("any kind", classes.length);
  $("image-class").replaceChildren(all, any, ...classes.map((name, k) => new Option(name, k)));
  Object.assign(state, { class: "all", w: 0 });
  run = before = NOTHING;
  $("comparison").hidden = true;
  for (const id of ["noise", "grid"]) $(id).width += 0; // clears it
  $("image-at").textContent = "";
  render();
  follow($("grid"), (isSeen) => isSeen && mayBegin && !work.busy && draw());
}

export function startImages() {
  show = bind(state, "image-", changed);
  $("sample").onclick = () => {
    if (run.frames.length && !isNew && !work.busy) state.seed++; // other images
    draw();
  };
  $("stop").onclick = () => work.stop();
  $("image-step").onchange = () => announce($("image-at").textContent);
  work.changed = render;
}
