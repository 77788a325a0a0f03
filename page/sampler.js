// The diffusion process of ddpm.py in JavaScript: the forward process, the samplers, guidance.
// Numbers in brackets are equations of the paper, arXiv:2006.11239. t counts 0..T-1, as in ddpm.py.
// Images are Float32Array in [-1, 1], in the order (B, C, H, W).

/** The running products abar_t of alpha_t = 1 - beta_t. */
export function alphasBar(betas) {
  let product = 1;
  return Array.from(betas, (beta) => (product *= 1 - beta));
}

/** The paper's schedule. */
export const T = 1000, BETAS = Array.from({ length: T }, (_, t) => 1e-4 + ((0.02 - 1e-4) * t) / (T - 1));
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

/**
 * A chain through some of the T noise levels: {betas, tau}, both of length `steps`, 1..T. tau lists
 * the t of the full chain that the shorter one visits.
 */
export function respaced(betas, steps) {
  const T = betas.length;
  const tau = Array.from({ length: steps }, (_, k) => Math.floor((T * (k + 1)) / steps) - 1);
  const abar = alphasBar(betas);
  return { tau, betas: tau.map((t, i) => 1 - abar[t] / (i ? abar[tau[i - 1]] : 1)) };
}

/** The estimate of x_0 by (15), clipped to [-limit, limit]. */
export const predictX0 = (x, eps, abar, limit = Infinity) => x.map((value, k) =>
  Math.min(limit, Math.max(-limit, (value - Math.sqrt(1 - abar) * eps[k]) / Math.sqrt(abar))));

/**
 * The reverse process as an async generator: yields {t, x, x0} from t = T-1 down.
 * x is x_t, the input of the network; x0 is the current estimate of the clean images, and the last
 * one is the sample.
 * epsModel(x, t) returns eps, or a promise of it. drawNoise() returns the next z.
 * variance: sigma_t^2 of "ddpm" is beta_t if "large", the posterior variance (7) if "small".
 * steps: how many of the T steps to take; all by default.
 * sampler: "ddpm" is the paper's Algorithm 2; "ddim" is DDIM; "sa-solver" is SA-Solver without noise.
 * clip: whether x0 is clipped to [-1, 1].
 * xT: where to start; pure noise by default. To continue from an x_t, pass betas.slice(0, t + 1) too.
 */
export async function* sampleProgressive(
  epsModel, drawNoise, betas, { variance = "large", steps = betas.length, sampler = "ddpm", xT, clip = true } = {},
) {
  const chain = respaced(betas, steps), abars = alphasBar(chain.betas), solverStep = saSolverStep(abars);
  let x = xT ?? drawNoise();
  for (let i = steps - 1; i >= 0; i--) {
    const beta = chain.betas[i], abar = abars[i], eps = await epsModel(x, chain.tau[i]);
    const x0 = predictX0(x, eps, abar, clip ? 1 : Infinity);
    yield { t: chain.tau[i], x, x0 };
    if (i === 0) return; // the last step adds no noise, and its mean is x0 itself
    const abarPrev = abars[i - 1];
    if (sampler === "sa-solver") {
      x = solverStep(x0, x, i);
    } else if (sampler === "ddim") { // with eps recomputed from the clipped x_0
      const fromX = Math.sqrt((1 - abarPrev) / (1 - abar)), fromX0 = Math.sqrt(abarPrev) - Math.sqrt(abar) * fromX;
      x = x.map((value, k) => fromX0 * x0[k] + fromX * value);
    } else { // (7)
      const fromX0 = (Math.sqrt(abarPrev) * beta) / (1 - abar);
      const fromX = (Math.sqrt(1 - beta) * (1 - abarPrev)) / (1 - abar);
      const noise = variance === "large" ? beta : ((1 - abarPrev) / (1 - abar)) * beta;
      const sigma = Math.sqrt(noise), z = drawNoise();
      x = x.map((value, k) => fromX0 * x0[k] + fromX * value + sigma * z[k]);
    }
  }
}

/**
 * The weights c of: integral from start to end of e^(s - end) x0(s) ds = sum of c_k x0_k. x0(s) is
 * the polynomial through the points (nodes[k], x0_k).
 */
function nodeWeights(nodes, start, end) {
  const h = end - start, moments = [-Math.expm1(-h)]; // the integrals of e^u u^k from -h to 0
  for (let k = 1; k < nodes.length; k++) moments.push(-Math.exp(-h) * (-h) ** k - k * moments[k - 1]);
  return nodes.map((node) => {
    let powers = [1]; // the coefficients of Lagrange's polynomial, which is 1 at this node
    for (const other of nodes) {
      if (other === node) continue; // multiply it by (u - other) / (node - other)
      const lower = [0, ...powers], same = [...powers, 0];
      powers = lower.map((value, k) => (value - (other - end) * same[k]) / (node - other));
    }
    return powers.reduce((sum, power, k) => sum + moments[k] * power, 0);
  });
}

/** The function step(x0, x, t), which returns x_{t-1}, of SA-Solver without noise: that of beyond.py. */
function saSolverStep(abar, order = 3) {
  const lambda = abar.map((value) => Math.log(value / (1 - value)) / 2);
  const signal = abar.map(Math.sqrt), spread = abar.map((value) => Math.sqrt(1 - value));
  const nodes = [], estimates = []; // the latest first
  let begin = null; // where the last step began
  const solve = (x, before, after) => { // x at the level `after`, from x at the level `before`
    const weights = nodeWeights(nodes, lambda[before], lambda[after]);
    return x.map((value, k) => estimates.reduce(
      (sum, x0, n) => sum + signal[after] * weights[n] * x0[k],
      (spread[after] / spread[before]) * value));
  };
  return (x0, x, t) => {
    nodes.unshift(lambda[t]);
    estimates.unshift(x0);
    nodes.length = estimates.length = Math.min(order, nodes.length);
    begin = begin ? solve(begin, t + 1, t) : x;
    return solve(begin, t, t - 1);
  };
}

/**
 * An epsModel(x, t) of classifier-free guidance: (1 + w) eps given the classes y, minus w eps.
 * y has the index of the class of each image, or classes.length for "no class".
 */
export function guided(network, y, w) {
  const none = y.map(() => network.classes.length);
  return async (x, t) => {
    if (w === 0) return network.eps(x, t, y);
    const twice = new Float32Array(2 * x.length);
    twice.set(x);
    twice.set(x, x.length);
    const eps = await network.eps(twice, t, [...y, ...none]);
    return x.map((_, k) => (1 + w) * eps[k] - w * eps[k + x.length]);
  };
}

/** A standard normal number by the Box-Muller transform. random: a function of `uniform`. */
export const normal = (random) => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());

/** A drawNoise() for `batch` images of `size` standard normal numbers; those of image k depend on (seed, k) alone. */
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
