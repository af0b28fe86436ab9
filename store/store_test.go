package store_test

import (
	"testing"

	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// openRedis opens a store on a redis-server of the test's own.
func openRedis(t testing.TB, c store.Config) (*store.Store, *storetest.Redis) {
	t.Helper()
	url, ctl := startRedis(t)
	c.URL = url
	return open(t, c), ctl
}

func startRedis(t testing.TB) (string, *storetest.Redis) {
	t.Helper()
	return storetest.StartRedis(t)
}

func open(t testing.TB, c store.Config) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

// openEmbedded opens a store in this process.
func openEmbedded(t testing.TB, c store.EmbeddedConfig) *store.Store {
	t.Helper()
	s, err := store.OpenEmbedded(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func closeStore(t testing.TB, s *store.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func TestConformance(t *testing.T) {
	t.Run("redis", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) *store.Store {
			s, _ := openRedis(t, store.Config{})
			return s
		})
	})
	t.Run("embedded", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) *store.Store {
			dir := t.TempDir()
			return openEmbedded(t, store.EmbeddedConfig{Dir: dir, Ledger: dir + "/ledger.json"})
		})
	})
}
