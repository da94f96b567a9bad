// resumable-stream in a plain Node HTTP server; a job's source is the Redis channel that has its id.
// As in its README's "Usage with explicit resumption" POST /jobs/ID starts the stream and GET /jobs/ID?resumeAt=N
// follows it; with API=idempotent as in its "Idempotent API": the first GET starts it and has it at first hand.
import { once } from "node:events";
import { createServer } from "node:http";
import { createResumableStreamContext } from "resumable-stream";
import { createClient } from "redis";

const END = "[DONE]";
const isIdempotent = process.env.API === "idempotent";
const source = createClient({ url: process.env.REDIS_URL });
await source.connect();
const context = createResumableStreamContext({ waitUntil: null }); // its own two clients, at REDIS_URL

// The source of a job, and when it is subscribed: whoever asked is answered no earlier.
function sourceOf(id) {
  const made = { isSubscribed: null };
  made.stream = () =>
    new ReadableStream({
      start(controller) {
        made.isSubscribed = source.subscribe(id, (message) => {
          if (message !== END) return controller.enqueue(`data: ${message}\n\n`);
          controller.close();
          return source.unsubscribe(id);
        });
      },
    });
  return made;
}

async function drain(stream) {
  for await (const _ of stream); // the starter's own copy: nobody reads it here
}

createServer(async (request, response) => {
  const url = new URL(request.url, "http://host");
  const id = url.pathname.split("/").pop();
  const job = sourceOf(id);
  if (request.method === "POST") {
    drain(await context.createNewResumableStream(id, job.stream));
    await job.isSubscribed;
    return response.writeHead(201).end();
  }
  const resumeAt = Number(url.searchParams.get("resumeAt"));
  const stream = isIdempotent
    ? await context.resumableStream(id, job.stream, resumeAt)
    : await context.resumeExistingStream(id, resumeAt);
  await job.isSubscribed;
  if (!stream) return response.writeHead(422).end();
  response.writeHead(200, { "Content-Type": "text/event-stream" }).flushHeaders();
  const reader = stream.getReader();
  response.on("close", () => reader.cancel());
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return response.end();
    if (!response.write(value)) await once(response, "drain");
  }
}).listen(Number(process.env.PORT), "127.0.0.1");
