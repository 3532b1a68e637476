// A Garden client in another language, written from the protocol alone (its sections are cited), and a bridge by which the
// tests drive it: one JSON command per line on stdin, one JSON answer per line on stdout, in any order, by "id".

import http from "node:http";
import net from "node:net";
import readline from "node:readline";

const address = process.argv[2];
const unixPath = address.startsWith("unix:") ? address.slice("unix:".length) : null;
const separator = address.lastIndexOf(":");
const target = unixPath ? { path: unixPath } : { host: address.slice(0, separator), port: Number(address.slice(separator + 1)) };

// --- ordinary calls (§1.1 to §1.3): Node's own HTTP client, a connection each

function call(method, path, body, headers) {
  return new Promise((resolve, reject) => {
    const where = unixPath ? { socketPath: unixPath } : target;
    const fields = { Host: "api", Connection: "close", ...headers };
    if (body) fields["Content-Length"] = body.length;
    const request = http.request({ ...where, method, path, headers: fields, agent: false }, (response) => {
      const pieces = [];
      response.on("data", (piece) => pieces.push(piece));
      response.on("end", () => resolve({ status: response.statusCode, headers: response.headers, body: Buffer.concat(pieces) }));
      response.on("error", reject);
    });
    request.on("error", reject);
    request.end(body ?? undefined);
  });
}

// --- hijacked connections (§6.1, §6.2): the head is parsed by hand, what follows is raw whatever the head says

function hijack(method, path, body) {
  return new Promise((resolve, reject) => {
    const socket = net.connect(target);
    let received = Buffer.alloc(0);
    const lines = [`${method} ${path} HTTP/1.1`, "Host: api", "User-Agent: foreign/1"];
    if (body) lines.push("Content-Type: application/json", `Content-Length: ${body.length}`);
    socket.write(lines.join("\r\n") + "\r\n\r\n");
    if (body) socket.write(body);
    const onData = (piece) => {
      received = Buffer.concat([received, piece]);
      const end = received.indexOf("\r\n\r\n");
      if (end < 0) return;
      const [first, ...rest] = received.subarray(0, end).toString("latin1").split("\r\n");
      const headers = Object.fromEntries(rest.map((line) => [line.slice(0, line.indexOf(":")).toLowerCase(), line.slice(line.indexOf(":") + 1).trim()]));
      const status = Number(first.split(" ")[1]);
      const behind = received.subarray(end + 4);
      if (status >= 200 && status < 300) {
        // §6.2: a client like the stock one takes the socket back only for such heads.
        if (headers["transfer-encoding"] !== "chunked" || headers.connection === "close") {
          socket.destroy();
          reject(new Error(`head that clients cannot take over: ${JSON.stringify(headers)}`));
          return;
        }
        socket.off("data", onData);
        socket.pause();
        if (behind.length) socket.unshift(behind);
        resolve({ socket });
      } else if (behind.length >= Number(headers["content-length"])) {
        socket.destroy();
        resolve({ failure: { status, body: behind.toString() } });
      }
    };
    socket.on("data", onData);
    socket.once("end", () => reject(new Error("the connection ended before a whole head")));
    socket.once("error", reject);
  });
}

// --- processes (§6.3 to §6.5)

const processes = new Map();

class GardenProcess {
  constructor(handle, socket) {
    this.handle = handle;
    this.socket = socket;
    this.lines = "";
    this.messages = [];
    this.waiters = [];
    this.ended = false;
    this.outputs = {};
    this.sides = {};
    socket.setEncoding("utf8");
    socket.on("data", (text) => {
      this.lines += text;
      let at;
      while ((at = this.lines.indexOf("\n")) >= 0) {
        this.messages.push(JSON.parse(this.lines.slice(0, at)));
        this.lines = this.lines.slice(at + 1);
      }
      this.wake();
    });
    const end = () => { this.ended = true; this.wake(); };
    socket.on("end", end);
    socket.on("close", end);
    socket.on("error", end);
    socket.resume();
  }

  wake() {
    for (const waiter of this.waiters.splice(0)) waiter();
  }

  async nextMessage() {
    while (!this.messages.length) {
      if (this.ended) throw new Error("connection: decode failed: EOF");
      await new Promise((resolve) => this.waiters.push(resolve));
    }
    return this.messages.shift();
  }

  async openSide(name) {
    const { socket, failure } = await hijack("GET", `/containers/${encodeURIComponent(this.handle)}/processes/${encodeURIComponent(this.id)}/attaches/${this.streamId}/${name}`);
    if (failure) throw new Error(`connection: failed to hijack stream ${name}`);
    this.outputs[name] = [];
    this.sides[name] = new Promise((resolve) => {
      socket.on("data", (piece) => this.outputs[name].push(piece));
      socket.on("close", resolve);
      socket.on("error", () => {});
      socket.resume();
    });
  }

  send(message) {
    this.socket.write(JSON.stringify({ process_id: this.id, ...message }) + "\n");
  }

  async wait() {
    for (;;) {
      const message = await this.nextMessage();
      if (message.error !== undefined) throw new Error(`connection: process error: ${message.error}`);
      if (message.exit_status === undefined) continue;
      await this.sidesEnd(); // §6.5, statement 24
      this.socket.destroy();
      return message.exit_status;
    }
  }

  sidesEnd() {
    return Promise.all(Object.values(this.sides));
  }
}

async function begin(method, path, handle, body, sides) {
  const { socket, failure } = await hijack(method, path, body);
  if (failure) return { failure };
  const found = new GardenProcess(handle, socket);
  const first = await found.nextMessage();
  found.id = first.process_id;
  found.streamId = first.stream_id;
  for (const name of sides) await found.openSide(name); // stdout first, then stderr
  const key = `${found.streamId}/${found.id}`;
  processes.set(key, found);
  return { key, process_id: found.id, stream_id: found.streamId };
}

// --- the bridge

const commands = {
  async call({ method, path, body, headers }) {
    const reply = await call(method, path, body === null ? null : Buffer.from(body, "base64"), headers);
    return { ...reply, body: reply.body.toString("base64") };
  },
  run: ({ handle, spec, sides }) =>
    begin("POST", `/containers/${encodeURIComponent(handle)}/processes`, handle, Buffer.from(JSON.stringify(spec) + "\n"), sides),
  attach: ({ handle, process, query, sides }) =>
    begin("GET", `/containers/${encodeURIComponent(handle)}/processes/${encodeURIComponent(process)}${query}`, handle, null, sides),
  async send({ key, message }) { processes.get(key).send(message); return {}; },
  async wait({ key }) { return { status: await processes.get(key).wait() }; },
  async next({ key }) { return { message: await processes.get(key).nextMessage() }; },
  async leave({ key }) { processes.get(key).socket.destroy(); return {}; },
  async sides({ key }) { await processes.get(key).sidesEnd(); return {}; },
  async output({ key, name }) { return { data: Buffer.concat(processes.get(key).outputs[name]).toString("base64") }; },
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const { id, op, ...parameters } = JSON.parse(line);
  commands[op](parameters).then(
    (result) => process.stdout.write(JSON.stringify({ id, result }) + "\n"),
    (error) => process.stdout.write(JSON.stringify({ id, error: String(error.message ?? error) }) + "\n"),
  );
}
process.exit(0);
