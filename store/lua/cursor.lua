-- cursor reads a feed's cursor together with the incarnation it belongs to.
return {redis.call('HGET', meta, 'incarnation'), redis.call('HGET', cursors, ARGV[3]) or ''}
