package guest

// What the other ways into a guest share with the agent: what they read of a runner comes
// from inside as well, and is bounded and understood in the same way.

// BusyJob returns the job's name if a line of a runner's output says that a job began.
func BusyJob(line string) (job string, ok bool) { return parseBusy(line) }

// Checked is a status as a guest gave it, with every field within its bounds; ok is false
// if its state is none.
func Checked(s Status) (_ Status, ok bool) { return s.checked() }
