// What network.js asks: eps_theta(x_t, t) of a model, computed by ONNX Runtime in this worker.
// An answer {error} has a sentence, or "" if ONNX Runtime could not be loaded.

const models = []; // {session, shape, classes} of each number
let runtime; // a promise of ONNX Runtime, and of where it computes
let last = Promise.resolve(); // the answer before, because ONNX Runtime computes one at a time

/** Load ONNX Runtime from the first of two folders that has it. */
async function load(folders) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const isOnGpu = adapter && !adapter.info?.isFallbackAdapter; // which would be slower than a CPU
  const build = isOnGpu ? "webgpu" : "wasm"; // that with WebGPU is twice as large
  const from = (folder) => import(`${folder}ort.${build}.bundle.min.mjs`);
  const lose = () => { throw new Error(""); };
  const ort = await from(folders[0]).catch(() => from(folders[1])).catch(lose);
  return { ort, providers: isOnGpu ? ["webgpu", "wasm"] : ["wasm"] };
}

/** Compare the eps of an example with the answer in the file, as sample.py does on CUDA. */
async function check(model, T, values) {
  const size = model.shape.reduce((product, its) => product * its);
  const x = Float32Array.from({ length: size }, (_, k) => Math.SQRT2 * Math.sin(k));
  const answer = await eps(model, { x, t: Math.floor(T / 2) }), apart = Math.ceil(size / 64);
  const wrong = Math.hypot(...values.map((value, k) => answer.eps[k * apart] - value));
  const error = (100 * wrong) / Math.hypot(...values);
  if (values.length && !(error < 5)) {
    throw new Error(`it computes an eps that is wrong by ${error.toFixed(0)} %`);
  }
}

/** Open a model, where it computes rightly; the last place may say why it does not. */
async function start({ number, bytes, folders, T, values, shape, classes }) {
  runtime ??= load(folders);
  const { ort, providers } = await runtime.catch((error) => {
    runtime = null; // it is tried again
    throw error;
  });
  for (const [k, provider] of providers.entries()) {
    const options = { executionProviders: [provider], logSeverityLevel: 4 }; // errors are thrown
    try {
      const session = await told(ort.InferenceSession.create(bytes, options));
      models[number] = { session, shape, classes, ort };
      await check(models[number], T, values);
      return {};
    } catch (error) {
      if (k === providers.length - 1) throw error;
      console.warn(`${provider} fails: ${error.message}`);
    }
  }
}

/** What a promise of ONNX Runtime gives. Its errors are for the console. */
const told = (promise) => promise.catch((error) => {
  console.warn(error?.message ?? error);
  throw new Error("ONNX Runtime cannot run it");
});

async function eps({ ort, session, shape, classes }, { x, t, y }) {
  const batch = x.length / (shape[0] * shape[1] * shape[2]);
  const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [batch]);
  const x_t = new ort.Tensor("float32", x, [batch, ...shape]);
  const feeds = { x_t, t: integers(Array(batch).fill(t)) };
  if (classes.length) feeds.y = integers(y ?? Array(batch).fill(classes.length));
  const results = await told(session.run(feeds)), result = await results.eps.getData();
  if (!result.every(Number.isFinite)) throw new Error(`eps is not finite at level ${t + 1}`);
  return { eps: result.slice() }; // a copy, because the runtime may use its memory again
}

async function close(number) {
  await models[number]?.session.release();
  delete models[number];
  return {};
}

/** Answer a question: {bytes, ...} opens a model, {x, t, y} asks for its eps, and {} closes it. */
async function answer(question) {
  try {
    if (question.bytes) return await start(question);
    return await (question.x ? eps(models[question.number], question) : close(question.number));
  } catch (error) {
    return { error: String(error?.message ?? error) };
  }
}

self.onmessage = ({ data }) => {
  last = last.then(async () => self.postMessage(await answer(data)));
};
