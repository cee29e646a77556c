// Node's cluster, round robin: the primary process accepts, and passes each connection to the
// next of its workers.
//
// Invariant: it speaks the protocol of serving.py, as its documentation has one do
// it: https://nodejs.org/api/cluster.html
"use strict";

const cluster = require("node:cluster");
const net = require("node:net");

const REQUEST = 64;
const BURN = "b".charCodeAt(0);
// Microseconds of CPU.
const BURN_TIME = 50000;
const WORKERS = 4;
const BACKLOG = 4096;

function burn() {
  const begin = process.cpuUsage();
  let used;
  do {
    used = process.cpuUsage(begin);
  } while (used.user + used.system < BURN_TIME);
}

function serve() {
  const answer = `${process.pid}\n`;
  const server = net.createServer((socket) => {
    let length = 0;
    let burns = false;
    // A client that resets its connection, as it does to end an idle one, is not a failure.
    socket.on("error", () => {});
    socket.on("data", (data) => {
      if (length === 0) burns = data[0] === BURN;
      length += data.length;
      if (length < REQUEST) return;
      if (burns) burn();
      socket.end(answer);
    });
  });
  server.listen({ port: 0, host: "127.0.0.1", backlog: BACKLOG });
}

function manage() {
  cluster.schedulingPolicy = cluster.SCHED_RR;
  let ready = 0;
  cluster.on("listening", (_, address) => {
    ready += 1;
    // Each was given the same port.
    if (ready === WORKERS) process.stdout.write(`${JSON.stringify({ port: address.port })}\n`);
  });
  for (let i = 0; i < WORKERS; i++) cluster.fork();
  // Workers end with the channel to this process, even if it is killed.
  const end = () => process.exit();
  process.on("SIGTERM", end);
  process.stdin.on("end", end).resume();
}

if (cluster.isPrimary) manage();
else serve();
