// What network.js asks: eps_theta(x_t, t) of one model, computed by ONNX Runtime in this worker.
// An answer {error} has a sentence, or "" if ONNX Runtime could not be loaded.

let ort, session, shape, classes;

/** Compare the eps of an example with the answer in the file, as sample.py does on CUDA. */
async function check(T, values) {
  const size = shape[0] * shape[1] * shape[2];
  const x = Float32Array.from({ length: size }, (_, k) => Math.SQRT2 * Math.sin(k));
  const answer = await eps({ x, t: Math.floor(T / 2) }), apart = Math.ceil(size / 64);
  const wrong = Math.hypot(...values.map((value, k) => answer.eps[k * apart] - value));
  const error = (100 * wrong) / Math.hypot(...values);
  if (values.length && !(error < 5)) {
    throw new Error(`it computes an eps that is wrong by ${error.toFixed(0)} %`);
  }
}

/** Load ONNX Runtime from the first of two folders that has it, and open the model. */
async function start({ bytes, folders, T, values, ...file }) {
  ({ shape, classes } = file);
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const build = adapter ? "webgpu" : "wasm"; // that with WebGPU is twice as large
  const load = (folder) => import(`${folder}ort.${build}.bundle.min.mjs`);
  const lose = () => { throw new Error(""); };
  ort = await load(folders[0]).catch(() => load(folders[1])).catch(lose);
  const create = async (provider) => {
    const options = { executionProviders: [provider], logSeverityLevel: 4 }; // errors are thrown
    session = await ort.InferenceSession.create(bytes, options);
    await check(T, values);
  };
  const warn = (error) => console.warn(`WebGPU fails: ${error.message}`);
  const isOnGpu = adapter && await create("webgpu").then(() => true, warn);
  if (!isOnGpu) await create("wasm");
  return {};
}

async function eps({ x, t, y }) {
  const batch = x.length / (shape[0] * shape[1] * shape[2]);
  const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [batch]);
  const x_t = new ort.Tensor("float32", x, [batch, ...shape]);
  const feeds = { x_t, t: integers(Array(batch).fill(t)) };
  if (classes.length) feeds.y = integers(y ?? Array(batch).fill(classes.length));
  const results = await session.run(feeds), result = await results.eps.getData();
  if (!result.every(Number.isFinite)) throw new Error(`eps is not finite at level ${t + 1}`);
  return { eps: result.slice() }; // a copy, because the runtime may use its memory again
}

self.onmessage = async ({ data }) => {
  try {
    self.postMessage(await (data.bytes ? start(data) : eps(data)));
  } catch (error) {
    self.postMessage({ error: String(error?.message ?? error) });
  }
};
