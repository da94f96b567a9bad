import OpenAI from "openai";

const client = new OpenAI({ apiKey: "YOUR_API_KEY", baseURL: "http://127.0.0.1:8080/v1" });
let stream = await client.responses.create({
  model: "gpt-5.4", input: "Write a haiku about streaming.", background: true, stream: true,
});
let id, last, isOver = false;
while (!isOver) {
  try {
    for await (const event of stream) {
      last = event.sequence_number;
      if (event.type === "response.created") id = event.response.id;
      if (event.type === "response.output_text.delta") process.stdout.write(event.delta);
      isOver = ["response.completed", "response.incomplete", "response.failed"].includes(event.type);
      if (last === 9) throw new OpenAI.APIConnectionError({ message: "as if the connection had been lost" });
    }
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    // The network, or a relay that goes: the response itself goes on.
    stream = await client.responses.retrieve(id, { stream: true, starting_after: last });
  }
}

const again = await client.responses.create({ model: "gpt-5.4", input: "Tell me a long story.", background: true });
console.log("\n" + (await client.responses.cancel(again.id)).status);
