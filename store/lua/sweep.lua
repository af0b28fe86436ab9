-- sweep forgets tombstones older than a time in milliseconds; the leader alone does it.
local why = unfenced(ARGV[3], ARGV[4])
if why then return {'fenced', why} end
return {redis.call('ZREMRANGEBYSCORE', tombs, '-inf', '(' .. ARGV[5])}
