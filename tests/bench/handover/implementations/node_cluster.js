// Node's cluster: node node_cluster.js PORT WORKERS. SIGHUP replaces the workers one after another:
// a new one listens before an old one stops accepting and ends.
'use strict';
const cluster = require('cluster');
const http = require('http');

const [port, workers] = process.argv.slice(2).map(Number);

if (cluster.isPrimary) {
  for (let i = 0; i < workers; i++) cluster.fork();
  process.on('SIGHUP', () => {
    const old = Object.values(cluster.workers).filter((each) => !each.exitedAfterDisconnect);
    const next = () => {
      const each = old.shift();
      if (!each) return;
      cluster.fork().once('listening', () => {
        each.disconnect();
        next();
      });
    };
    next();
  });
} else {
  const answer = String(process.pid);
  http
    .createServer((request, response) => {
      response.writeHead(200, {'Content-Length': answer.length, 'Connection': 'close'});
      response.end(answer);
    })
    .listen(port, '127.0.0.1');
}
