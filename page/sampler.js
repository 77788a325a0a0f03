// Diffusion in JavaScript: the forward process of ddpm.py; the reverse process and the guidance of
// sample.py. Numbers in brackets are equations of the paper, arXiv:2006.11239. t counts 0..T-1, as in
// ddpm.py, so that level t of the paper has the index t - 1.
// Images are Float32Array in [-1, 1], in the order (B, C, H, W).

/** The running products abar_t of alpha_t = 1 - beta_t. */
export function alphasBar(betas) {
  let product = 1;
  return Array.from(betas, (beta) => (product *= 1 - beta));
}

/** The paper's schedule. */
export const T = 1000;
export const BETAS = Array.from({ length: T }, (_, t) => 1e-4 + ((0.02 - 1e-4) * t) / (T - 1));
export const ABAR = alphasBar(BETAS);

/** [sqrt(abar), sqrt(1 - abar)] at a level from -1, which is x_0, to T - 1; also between two levels. */
export function partsAt(level, abars = ABAR) {
  const low = Math.floor(level), at = (t) => (t < 0 ? 1 : abars[Math.min(t, abars.length - 1)]);
  const abar = at(low) + (level - low) * (at(low + 1) - at(low));
  return [Math.sqrt(abar), Math.sqrt(1 - abar)];
}

/** x_t ~ q(x_t | x_0) (4) at a level, also between two levels. */
export function qSample(x0, level, noise, abars = ABAR) {
  const [signal, spread] = partsAt(level, abars);
  return x0.map((value, k) => signal * value + spread * noise[k]);
}

/** x on DDIM's way from a state {t, x, x0} down to a level: the estimate x0 and the noise stay. */
export function between({ t, x, x0 }, level, abars = ABAR) {
  const [signal, noise] = partsAt(level, abars), [before, rest] = partsAt(t, abars);
  return rest ? x.map((value, k) => signal * x0[k] + (noise / rest) * (value - before * x0[k])) : x;
}

/** The `steps` of T levels that the reverse process visits: T - 1 first, and T / steps - 1 at last. */
export const levelsOf = (T, steps) =>
  Array.from({ length: steps }, (_, k) => Math.floor((T * (steps - k)) / steps) - 1);

/** The estimate of x_0 by (15), clipped to [-limit, limit]. */
export const predictX0 = (x, eps, abar, limit = Infinity) => x.map((value, k) =>
  Math.min(limit, Math.max(-limit, (value - Math.sqrt(1 - abar) * eps[k]) / Math.sqrt(abar))));

/**
 * The loop of sample.py, with the samplers that add no noise, as an async generator: yields
 * {t, x, x0} from t = T-1 down. x is x_t, the input of the network, and at first xT; x0 is the
 * current estimate of the clean images, and the last one is the sample.
 * eps(x, t) returns the noise in x, or a promise of it. To start at an x_t, pass it as xT, with
 * betas.slice(0, t + 1).
 * steps: how many of the T steps to take. sampler: "dpm-solver++" or "ddim".
 * clip: whether x0 is clipped to [-1, 1].
 */
export async function* reverse(eps, xT, betas, { steps, sampler = "dpm-solver++", clip = true }) {
  const abars = alphasBar(betas), levels = levelsOf(betas.length, steps);
  let x = xT, earlier = null;
  for (const [k, t] of levels.entries()) { // a step leads from t to s
    const s = levels[k + 1], x0 = predictX0(x, await eps(x, t), abars[t], clip ? 1 : Infinity);
    yield { t, x, x0 };
    if (s === undefined) return;
    let target = x0;
    if (sampler === "dpm-solver++") { // extrapolate x0 in log SNR to the middle of the step
      const [logSnr, logSnrS] = [abars[t], abars[s]].map((abar) => Math.log(abar / (1 - abar)));
      if (earlier) {
        const rate = (logSnrS - logSnr) / 2 / (logSnr - earlier.logSnr), before = earlier.x0;
        target = x0.map((value, i) => value + rate * (value - before[i]));
      }
      earlier = { logSnr, x0 };
    }
    x = between({ t, x, x0: target }, s, abars);
  }
}

/**
 * eps(x, t) of classifier-free guidance: (1 + w) eps given y, minus w eps without a class.
 * y has the index of the class of each image.
 */
export const guided = (network, y, w) => async (x, t) => {
  const given = await network.eps(x, t, y), without = w === 0 ? given : await network.eps(x, t);
  return given.map((value, k) => (1 + w) * value - w * without[k]);
};

/** A standard normal number by the Box-Muller transform. random: a function of `uniform`. */
export const normal = (random) =>
  Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());

/** A function that draws `batch` images of `size` standard normal numbers; those of image k depend
 * on seed and k only. */
export function noiseOf(seed, batch, size) {
  const streams = Array.from({ length: batch }, (_, k) => uniform(seed, k));
  return () => Float32Array.from({ length: batch * size }, (_, k) => normal(streams[Math.floor(k / size)]));
}

/** A function that draws uniform numbers in [0, 1): sfc32 of PractRand, seeded with two integers. */
export function uniform(seed, stream) {
  let a = seed >>> 0, b = stream >>> 0, c = Math.floor(seed / 2 ** 32), counter = 1;
  const next = () => {
    const sum = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + sum;
    return (sum >>> 0) / 2 ** 32;
  };
  for (let k = 0; k < 15; k++) next(); // until the seed has reached all bits
  return next;
}
