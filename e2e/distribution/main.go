// Command distribution is the registry of the distribution project, on loopback, with a
// directory as its storage: distribution ADDRESS DIR. It is built and started by the
// end-to-end tests, which kill it.
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: distribution ADDRESS DIR")
		os.Exit(2)
	}
	config := &configuration.Configuration{Storage: configuration.Storage{
		"filesystem": {"rootdirectory": os.Args[2]},
	}}
	config.HTTP.Secret = "for uploads that go on after a restart"
	config.Log.Level = "error"
	config.Catalog.MaxEntries = 1000
	server := &http.Server{
		Addr: os.Args[1], Handler: handlers.NewApp(context.Background(), config), ReadHeaderTimeout: 10 * time.Second,
	}
	fmt.Fprintln(os.Stderr, server.ListenAndServe())
	os.Exit(1)
}
