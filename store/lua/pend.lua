-- pend notes a session that waits for its node, and wakes the node's parked sync.
local id, node, actor, life = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local perNode, perActor, body = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
local ofNode, ofActor = 0, 0
for _, w in pairs(waiting()) do
	if w.node == node then ofNode = ofNode + 1 end
	if w.actor == actor then ofActor = ofActor + 1 end
end
if ofNode >= perNode then return {'full', 'of the node'} end
if ofActor >= perActor then return {'full', 'of the caller'} end
redis.call('HSET', pending, id, table.concat({whole(now + life), node, actor, body}, '\n'))
redis.call('ZREM', gone, 's' .. id)
mark('s' .. id)
redis.call('PUBLISH', channel, 'n:' .. node)
return {}
