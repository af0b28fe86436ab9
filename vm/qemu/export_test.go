package qemu

import "testing"

// ServeShares has another program than virtiofsd serve the directories of machines. Tests
// that use it are not parallel.
func ServeShares(t *testing.T, program string) (was string) {
	t.Helper()
	all := shareDaemons
	t.Cleanup(func() { shareDaemons = all })
	shareDaemons = []string{program}
	for _, path := range all {
		if isFile(path) {
			return path
		}
	}
	t.Fatalf("none of %q is there", all)
	return ""
}
