// A server that cloudflare/tableflip replaces: main PORT PIDFILE. SIGHUP starts the next one.
package main

import (
	"context"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

func main() {
	upgrader, err := tableflip.New(tableflip.Options{})
	if err != nil {
		panic(err)
	}
	defer upgrader.Stop()
	go func() {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGHUP)
		for range signals {
			_ = upgrader.Upgrade()
		}
	}()
	listener, err := upgrader.Fds.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	pid := strconv.Itoa(os.Getpid())
	answer := []byte(pid)
	server := http.Server{Handler: http.HandlerFunc(
		func(writer http.ResponseWriter, _ *http.Request) { _, _ = writer.Write(answer) })}
	go func() { _ = server.Serve(listener) }()
	if err := upgrader.Ready(); err != nil {
		panic(err)
	}
	if err := os.WriteFile(os.Args[2], []byte(pid), 0o600); err != nil {
		panic(err)
	}
	<-upgrader.Exit()
	limited, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_ = server.Shutdown(limited)
}
