// eps_theta(x_t, t) of the two included networks, which ONNX Runtime computes in a worker of its own.
// Images are Float32Array, in the order (B, C, H, W).

const RUNTIME = "onnxruntime-web@1.30.0";
// Where it is: beside the page, for use without a connection, or else on jsDelivr.
const FOLDERS = ["node_modules/onnxruntime-web", `https://cdn.jsdelivr.net/npm/${RUNTIME}`]
  .map((folder) => new URL(`${folder}/dist/ort.wasm.bundle.min.mjs`, import.meta.url).href);
// What their files say about them. kinds: the classes that are drawn, smiling faces, hearts, people,
// and in section 4 also flags; none: the number that means "no class".
const NETWORKS = {
  clothes: { file: "fashion-mnist.onnx", shape: [1, 32, 32], none: 10 },
  emoji: { file: "emoji.onnx", shape: [3, 32, 32], none: 98, kinds: [31, 50, 66, 16] },
};
const LOST = "The network could not be loaded. Connect to the internet, and reload the page. "
  + "Sections 1 and 2, and the first pictures of the opening, work without it.";
const opened = {}; // promises of the networks
let runtime = null; // a promise of ONNX Runtime

/** What to do with an error of ONNX Runtime or of the connection: the reader sees this text. */
const say = (text) => (error) => {
  console.warn(error);
  throw new Error(text);
};

async function start() {
  const ort = await import(FOLDERS[0]).catch(() => import(FOLDERS[1]));
  ort.env.logLevel = "fatal";
  Object.assign(ort.env.wasm, { proxy: true, numThreads: 1 }); // in a worker
  return ort;
}

async function open({ file, shape, none, kinds }) {
  runtime ??= start();
  const ort = await runtime, url = new URL(file, import.meta.url).href;
  const session = await ort.InferenceSession.create(url);
  const size = shape.reduce((product, side) => product * side);
  const run = async (x, t, y) => {
    const batch = x.length / size, integers = (values) =>
      new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [batch]);
    const feeds = { x_t: new ort.Tensor("float32", x.slice(), [batch, ...shape]) };
    feeds.t = integers(Array(batch).fill(t));
    feeds.y = integers(y ?? Array(batch).fill(none));
    return (await session.run(feeds)).eps.data;
  };
  const eps = (x, t, y) => run(x, t, y).catch(say("This browser could not run the network."));
  return { shape, kinds, eps };
}

/** A network, opened when first needed, or again after a failure: {shape: [C, H, W], kinds, eps}.
 * eps(x, t, y), for any number of images, is a promise; by default, y is "no class" for each. */
export const included = (name) => (opened[name] ??= open(NETWORKS[name]).catch((error) => {
  opened[name] = runtime = null;
  return say(LOST)(error);
}));
