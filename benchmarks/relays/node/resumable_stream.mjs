// resumable-stream as in its README's "Usage with explicit resumption", in a plain Node HTTP server.
// POST /jobs/ID starts a job's stream, whose source is the Redis channel ID; GET /jobs/ID?resumeAt=N follows it.
import { once } from "node:events";
import { createServer } from "node:http";
import { createResumableStreamContext } from "resumable-stream";
import { createClient } from "redis";

const END = "[DONE]";
const source = createClient({ url: process.env.REDIS_URL });
await source.connect();
const context = createResumableStreamContext({ waitUntil: null }); // its own two clients, at REDIS_URL

function follow(id) {
  return new ReadableStream({
    start(controller) {
      return source.subscribe(id, (message) => {
        if (message !== END) return controller.enqueue(`data: ${message}\n\n`);
        controller.close();
        return source.unsubscribe(id);
      });
    },
  });
}

async function drain(stream) {
  for await (const _ of stream); // the worker's own copy of the stream has no reader
}

createServer(async (request, response) => {
  const url = new URL(request.url, "http://host");
  const id = url.pathname.split("/").pop();
  if (request.method === "POST") {
    drain(await context.createNewResumableStream(id, () => follow(id)));
    return response.writeHead(201).end();
  }
  const stream = await context.resumeExistingStream(id, Number(url.searchParams.get("resumeAt")));
  if (!stream) return response.writeHead(422).end();
  response.writeHead(200, { "Content-Type": "text/event-stream" }).flushHeaders();
  response.on("close", () => stream.cancel().catch(() => {}));
  for await (const text of stream) if (!response.write(text)) await once(response, "drain");
  return response.end();
}).listen(Number(process.env.PORT), "127.0.0.1");
