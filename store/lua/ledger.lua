-- ledger compares a replica's ledger with the copy here and answers {version, body},
-- the body only if it is another version. An older copy (of an emptied store: none) is
-- replaced by the replica's. ARGV: version, body, and 1 to write only on version - 1.
local version, body, exactly = tonumber(ARGV[3]), ARGV[4], ARGV[5] == '1'
local have = tonumber(redis.call('HGET', ledger, 'version') or '0')
if have < version and (not exactly or have == version - 1) then
	redis.call('HSET', ledger, 'version', ARGV[3], 'body', body)
	redis.call('PUBLISH', channel, 'ledger')
	return {ARGV[3], ''}
end
if have == version and not exactly then return {ARGV[3], ''} end
return {whole(have), redis.call('HGET', ledger, 'body') or ''}
