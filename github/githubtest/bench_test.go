package githubtest_test

import (
	"testing"

	"github.com/paddock-ci/paddock/github/githubtest"
)

// A matrix of 256 jobs: what it costs to queue it, its webhooks written and validated.
func BenchmarkQueueMatrix(b *testing.B) {
	g, err := githubtest.New(githubtest.Config{Repositories: []githubtest.Repository{{Name: "acme/app"}}})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		_, ids, err := g.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{{Name: "m", Labels: macOS, Matrix: 256}}})
		if err != nil || len(ids) != 256 {
			b.Fatal(err, len(ids))
		}
	}
}
