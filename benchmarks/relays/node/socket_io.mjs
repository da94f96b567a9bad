// Socket.IO as its documentation sets it up behind Redis. ADAPTER: "redis" or "redis-streams".
import { createServer } from "node:http";
import { createAdapter as createRedisAdapter } from "@socket.io/redis-adapter";
import { createAdapter as createStreamsAdapter } from "@socket.io/redis-streams-adapter";
import { createClient } from "redis";
import { Server } from "socket.io";

const port = Number(process.env.PORT);
const redisPort = Number(process.env.REDIS_PORT);
const maxLen = Number(process.env.MAX_LEN);
const isStreams = process.env.ADAPTER === "redis-streams";
const client = createClient({ url: `redis://127.0.0.1:${redisPort}` });
const subscriber = client.duplicate();
client.on("error", console.error);
subscriber.on("error", console.error);
await Promise.all([client.connect(), subscriber.connect()]);

const httpServer = createServer();
const io = new Server(httpServer, {
  adapter: isStreams
    ? createStreamsAdapter(client, { onlyPlaintext: true, maxLen })
    : createRedisAdapter(client, subscriber),
  transports: ["websocket"],
  serveClient: false,
  pingInterval: 300_000, // the load program answers no pings
  connectionStateRecovery: isStreams ? {} : undefined, // what the streams adapter is for
});
io.engine.on("connection", (socket) => {
  socket.request = null; // "Performance tuning": frees the memory of the first HTTP request
});
io.on("connection", (socket) => {
  socket.join(socket.handshake.auth.job);
});
httpServer.listen(port, "127.0.0.1");
