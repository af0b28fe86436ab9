-- unpend ends a session's waiting and answers 1 if it still waited.
local id = ARGV[3]
local found = waiting()[id]
forget(id)
return {found and 1 or 0}
