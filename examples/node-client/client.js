// Drives a garden server from Node.js with nothing but its .proto: create, run with input and output, destroy.
//
//     npm ci && GARDEN_ADDRESS=unix:/run/garden/garden.sock node client.js
//
// Prints what the process wrote and exits with the process's code.

import { randomUUID } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTO_ROOT = fileURLToPath(new URL('../../proto', import.meta.url));
const MAX_MESSAGE_BYTES = 16 * 1024 * 1024;

function connect(address) {
  // Numbers above 2^53 arrive as strings; enums and oneofs by their names.
  const definition = protoLoader.loadSync('garden/v1/garden.proto', {
    includeDirs: [PROTO_ROOT],
    keepCase: true,
    longs: String,
    enums: String,
    oneofs: true,
  });
  const { garden } = grpc.loadPackageDefinition(definition);
  return new garden.v1.Garden(address, grpc.credentials.createInsecure(), {
    'grpc.max_receive_message_length': MAX_MESSAGE_BYTES,
    'grpc.max_send_message_length': MAX_MESSAGE_BYTES,
  });
}

// A unary call as a promise.
function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

// Runs a process with input on its stdin. Resolves, once its output is complete, to its exit status.
function run(client, handle, spec, input) {
  return new Promise((resolve, reject) => {
    const stream = client.RunProcess();
    let exit;
    stream.on('data', (event) => {
      if (event.event === 'output') {
        const out = event.output.stream === 'STDERR' ? process.stderr : process.stdout;
        out.write(event.output.data);
      } else if (event.event === 'exited') {
        exit = event.exited;
      }
    });
    stream.on('error', reject);
    stream.on('end', () => (exit ? resolve(exit) : reject(new Error('the stream ended before the process'))));
    // Our side stays open: the server ends the stream when everything has been said.
    stream.write({ start: { handle, spec: { id: randomUUID(), ...spec } } });
    stream.write({ input: { stdin: { data: Buffer.from(input), close: true } } });
  });
}

async function main() {
  const client = connect(process.env.GARDEN_ADDRESS ?? 'unix:/run/garden/garden.sock');
  const { server_version: version } = await call(client, 'Ping', {});
  console.error(`garden server ${version}`);
  const container = await call(client, 'CreateContainer', {
    spec: { properties: { owner: 'node-client' }, limits: { memory_bytes: 64 * 1024 * 1024 } },
  });
  console.error(`container ${container.handle} at ${container.container_ip}`);
  try {
    const script = 'tr a-z A-Z; echo "to stderr" >&2; exit 3';
    const exit = await run(client, container.handle, { path: 'sh', args: ['-c', script] }, 'hello from node\n');
    console.error(exit.end === 'signal' ? `signal ${exit.signal}` : `exit ${exit.code}`);
    return exit.end === 'signal' ? 128 + exit.signal : exit.code;
  } finally {
    await call(client, 'DestroyContainer', { handle: container.handle });
    client.close();
  }
}

process.exitCode = await main();
